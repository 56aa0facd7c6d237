"""Where output goes: what is there already, what cannot be written, and what an interrupt leaves."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptedge.cli import main
from tests.cli.run import run


def test_force_replaces(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", str(tiny_checkpoint), str(tmp_path / "b"), "--no-verify"]) == 0
    (tmp_path / "b" / "config.json").write_text("{}")
    assert main(["export", str(tiny_checkpoint), str(tmp_path / "b"), "--no-verify", "--force"]) == 0
    assert (tmp_path / "b" / "config.json").read_text() != "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("verb", ["export", "quantize"])
def test_force_replaces_nothing_but_models(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, verb: str
) -> None:
    command = [verb, tiny_checkpoint if verb == "export" else tiny_bundle, tmp_path / "texts", "--force"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "novel.txt").write_text("mine")
    code, _, err = run(capsys, *command)
    assert (code, err.count("\n")) == (2, 1)
    assert "texts is no bundle or checkpoint, and novel.txt in it would be lost; choose another output" in err
    assert (tmp_path / "texts" / "novel.txt").read_text() == "mine"
    (tmp_path / "texts" / "novel.txt").unlink()
    assert run(capsys, *command)[0] == 0, "an empty folder holds nothing to lose"


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"format_version": 1}'])
def test_force_keeps_what_is_no_part_of_the_bundle(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path, manifest: str | None
) -> None:
    """As far as the manifest says what is; a broken one, given here, says nothing."""
    out = shutil.copytree(tiny_bundle, tmp_path / "b")
    (out / "LICENSE").write_text("mine")
    if manifest:
        (out / "manifest.json").write_text(manifest)
    code, _, err = run(capsys, "quantize", tiny_bundle, out, "--recipe", "int4-rtn", "--force")
    assert (code, (out / "LICENSE").exists()) == ((0, False) if manifest else (2, True))
    assert manifest or f"LICENSE in {out} is no part of the bundle" in err


@pytest.mark.parametrize("verb", ["report", "explain", "eval"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    (tmp_path / "pairs").write_text('{"prompt": "a", "reference": "b"}\n')
    options = {"report": ["--out"], "explain": ["text", "--html"], "eval": ["--pairs", tmp_path / "pairs", "--out"]}
    monkeypatch.setattr("gptedge.loading.load", None)
    monkeypatch.setattr("os.access", lambda _path, mode: not mode & os.W_OK)
    code, _, err = run(capsys, verb, tiny_bundle, *options[verb], tmp_path / "made")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{tmp_path / 'made'} cannot be written: Permission denied" in err


@pytest.fixture
def small_disk(tmp_path: Path) -> object:
    """A folder that holds half a megabyte: a tmpfs where we may mount one, else a limit on the size of files."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True).returncode == 0
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 10, limits[1]))
    yield place
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)
    if mounted:
        subprocess.run(["umount", place], check=True)


def test_full_disk(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, small_disk: Path) -> None:
    code, out, err = run(capsys, "export", tiny_checkpoint, small_disk / "out")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert re.fullmatch(
        f"gptedge: {small_disk / 'out'} cannot be written: (No space left on device|File too large); "
        "make room and run again\n", err
    )  # fmt: skip
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("verb", ["export", "quantize", "generate", "eval", "train"])
def test_interrupt_at_any_stage(
    verb: str, number: signal.Signals, tiny_checkpoint: Path, tiny_bundle: Path, text_file: Path, tmp_path: Path
) -> None:
    """Signals at growing delays, until one comes too late: each ends with 130 and leaves nothing behind."""
    out = tmp_path / "work" / "out"
    out.parent.mkdir()
    commands = {
        "export": ["export", tiny_checkpoint, out],
        "quantize": ["quantize", tiny_bundle, out, "--recipe", "int4-rtn"],
        "generate": ["generate", tiny_bundle, "The", "--max-tokens", "250", "--temperature", "1"],
        "eval": ["eval", tiny_bundle, "--text", text_file, "--context", "16"],
        "train": ["train", "--data", text_file, "--out", out, "--max-steps", "100000"],
    }
    # The clock starts when Python has: how long that takes is the machine's affair.
    program = "import sys; from gptedge.cli import main; print(flush=True); sys.exit(main(sys.argv[1:]))"
    for delay in (0.1, 0.4, 1.0):
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, commands[verb])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        # An interrupt that passes through an extension's own evaluation ends by SIGINT itself: to a shell that is 130.
        assert process.returncode in (130, 0, 1, -signal.SIGINT, -number), err
        assert "Traceback" not in err, err
        if verb != "train":  # which keeps its state to go on from
            left = list(out.parent.iterdir())
            assert left in ([], [out]), err
            if left:  # the signal came after the output had its name: then it is whole
                assert main(["verify", str(out)]) == 0
                break
