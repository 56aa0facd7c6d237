"""What a user installs: no compiled Rust in it, and no more of it than there has to be.

`.[all]` in a fresh environment, every native library read, and the packages that the extra `export` needs weighed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Left in binaries by rustc: paths of its own sources in panic messages, its runtime's symbols, its version note.
MARKS = (b"/rustc/", b"rustc version ", b"rust_eh_personality", b"rust_begin_unwind", b"__rust_alloc", b"rust_panic")
NATIVE = {".so", ".dylib", ".dll", ".pyd", ".exe"}


def native_files(folder: Path) -> list[Path]:
    """Libraries by their names, and programs by their first bytes."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        if NATIVE & set(path.suffixes) or _first_bytes(path) in (b"\x7fELF", b"\xcf\xfa\xed\xfe"):
            found.append(path)
    return found


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as f:
        return f.read(4)


def rust_marks(path: Path) -> list[str]:
    """Which marks a file holds, read in overlapping pieces."""
    seen, tail = set(), b""
    with path.open("rb") as f:
        while piece := f.read(1 << 24):
            seen |= {m.decode() for m in MARKS if m in tail + piece}
            tail = piece[-64:]
    return sorted(seen)


def install(folder: Path, *what: str) -> Path:
    """Install into a fresh environment; the folder with its packages."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *what]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A fresh environment with everything in it, and the folder of its packages."""
    folder = tmp_path_factory.mktemp("fresh") / "env"
    return folder, install(folder, f"{ROOT}[all]")


@pytest.mark.slow
def test_everything_a_user_installs(environment: tuple[Path, Path], tmp_path: Path) -> None:
    folder, packages = environment
    files = native_files(packages)
    assert len(files) > 20, "torch, numpy and onnxruntime alone have more"
    carriers = {str(f.relative_to(packages)): marks for f in files if (marks := rust_marks(f))}
    assert carriers == {}
    # The installed wheel is the whole project: it runs from anywhere.
    gptedge = [folder / "bin" / "python", "-m", "gptedge"]
    done = subprocess.run([*gptedge, "doctor"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stdout
    code = (
        "import gptedge.export.sources, gptedge.quantize.recipes, gptedge.tui.app, gptedge.serve, gptedge.train.model"
    )
    subprocess.run([gptedge[0], "-c", code], check=True, cwd=tmp_path)


# Prints {package: bytes} of what gptedge[export] needs, bytecode left out, as pip would install it alone.
WEIGH = """
import json
from importlib import metadata
from packaging.requirements import Requirement
sizes, todo = {}, [("gptedge", "export")]
seen = set()
while todo:
    name, extra = todo.pop()
    if (name, extra) in seen:
        continue
    seen.add((name, extra))
    dist = metadata.distribution(name)
    files = [f.locate() for f in dist.files if f.suffix != ".pyc"]
    sizes[dist.name.lower()] = sum(f.stat().st_size for f in files if f.is_file())
    for line in dist.requires or ():
        r = Requirement(line)
        if r.marker is None or r.marker.evaluate({"extra": extra}):
            todo += [(r.name, e) for e in (r.extras or ("",))] + [(r.name, "")]
print(json.dumps(sizes))
"""
LARGEST = {"onnxruntime", "numpy", "onnx"}  # 64, 57 and 23 MB of 166; with bytecode all is a quarter more
MOST_MB = 175


@pytest.mark.slow
def test_what_exporting_needs_stays_small(environment: tuple[Path, Path]) -> None:
    folder, _ = environment
    done = subprocess.run([folder / "bin" / "python", "-c", WEIGH], capture_output=True, text=True, check=True)
    sizes = json.loads(done.stdout)
    assert sizes.keys() >= {"gptedge", "onnxruntime", "onnx", "gguf", "sentencepiece", "regex"}
    assert not sizes.keys() & {"torch", "transformers", "textual", "sympy"}
    assert set(sorted(sizes, key=sizes.__getitem__)[-3:]) == LARGEST
    assert sum(sizes.values()) < MOST_MB * 1e6, sizes


def test_the_scan_finds_rust_where_it_is() -> None:
    """The oracle of the tokenizer's tests is Rust: a scan that misses it would miss anything."""
    import tokenizers

    files = native_files(Path(tokenizers.__file__).parent)
    assert any(rust_marks(f) for f in files)
    assert not rust_marks(Path(sys.executable).resolve())
