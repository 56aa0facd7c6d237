"""What a user installs has no compiled Rust in it: `.[all]` in a fresh environment, every native library read."""

from __future__ import annotations

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


@pytest.mark.slow
def test_everything_a_user_installs(tmp_path: Path) -> None:
    packages = install(tmp_path / "env", f"{ROOT}[all]")
    files = native_files(packages)
    assert len(files) > 20, "torch, numpy and onnxruntime alone have more"
    carriers = {str(f.relative_to(packages)): marks for f in files if (marks := rust_marks(f))}
    assert carriers == {}
    # The installed wheel is the whole project: it runs from anywhere.
    gptedge = [tmp_path / "env" / "bin" / "python", "-m", "gptedge"]
    done = subprocess.run([*gptedge, "doctor"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stdout
    code = (
        "import gptedge.export.sources, gptedge.quantize.recipes, gptedge.tui.app, gptedge.serve, gptedge.train.model"
    )
    subprocess.run([gptedge[0], "-c", code], check=True, cwd=tmp_path)


def test_the_scan_finds_rust_where_it_is() -> None:
    """The oracle of the tokenizer's tests is Rust: a scan that misses it would miss anything."""
    import tokenizers

    files = native_files(Path(tokenizers.__file__).parent)
    assert any(rust_marks(f) for f in files)
    assert not rust_marks(Path(sys.executable).resolve())
