"""What is written where it is not read to its end, or not in UTF-8, or broken off."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptedge.cli import main
from gptedge.cli.generate import _print_text
from gptedge.interrupts import KILLS
from gptedge.runtime.generate import Chunk, Stream, Timings, Usage
from tests.cli.run import run


def test_stdout_takes_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert main(["verify", "wörld 你好", "--json"]) == 1
    sys.stdout.flush()
    assert "wörld 你好 does not exist" in json.loads(out.getvalue())["error"]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_output_that_cannot_be_written(tiny_bundle: Path, flags: list[str]) -> None:
    command = [sys.executable, "-m", "gptedge", "inspect", str(tiny_bundle), *flags]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "No space left" in done.stderr, "Traceback" in done.stderr) == (1, True, False)


def test_stdout_may_be_closed(tiny_bundle: Path) -> None:
    command = f"exec {sys.executable} -m gptedge inspect {tiny_bundle} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_while_the_command_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "gptedge.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "gptedge.cli.app")
    monkeypatch.delattr("gptedge.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Impatient(), *sys.meta_path])
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "gptedge: interrupted\n"


def test_a_terminal_that_closes_says_so_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """The second time, nothing is interrupted: what unwinds may hold locks."""
    before = {number: signal.getsignal(number) for number in KILLS}
    try:
        assert main(["--version"]) == 0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("said", "line"), [(["Once", ""], "Once\n"), ([""], ""), ([], "")])
def test_an_interrupted_reply_ends_its_line(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], line: str
) -> None:
    def interrupted(*_: object) -> Iterator[Chunk]:
        yield from (Chunk(text) for text in said)
        raise KeyboardInterrupt

    monkeypatch.setattr("gptedge.model.chunks", interrupted)
    assert run(capsys, "generate", tiny_bundle, "The") == (130, line, "gptedge: interrupted\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_reader_that_leaves_is_no_failure(tiny_bundle: Path, verb: str, unbuffered: str) -> None:
    command = [sys.executable, "-m", "gptedge", verb, tiny_bundle, "--max-tokens", "100"]
    with subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    ) as process:
        process.stdin.write(b"The quick brown fox\n")
        process.stdin.close()
        process.stdout.read(1)
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_another_pipe_that_breaks_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("gptedge.cli.app._invoke", broken)
    assert run(capsys, "doctor") == (1, "", "gptedge: Broken pipe\n")


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "a\\u{1b}[2J\tb\n"), (False, "a\x1b[2J\tb\r\n")])
def test_a_reply_does_not_command_a_terminal(
    is_terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chunks(_: threading.Event) -> Iterator[Chunk]:
        yield Chunk("a\x1b[2J\tb\r", (1,))
        yield Chunk("", finish_reason="stop", usage=Usage(1, 1), timings=Timings(0, 0, 0))

    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    _print_text(Stream(chunks, lambda _: None))
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}, {"GITHUB_ACTIONS": "true"}])
def test_a_failed_gate_fails_though_nobody_reads(
    environment: dict[str, str], tiny_bundle: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "gptedge", "quantize", str(tiny_bundle), str(tmp_path / "q")]
    command += ["--recipe", "int4-rtn", "--max-size-mb", "0.01"]
    given = {k: v for k, v in os.environ.items() if k not in ("PYTHONUNBUFFERED", "GITHUB_STEP_SUMMARY")}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=given | environment)
    os.close(writer)
    assert done.returncode == 4, done.stderr
    assert "FAILED" in done.stderr
    assert "Exception ignored" not in done.stderr
