"""What is written where it is not read to its end, or not in UTF-8, or broken off."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptedge.cli import main
from gptedge.runtime.generate import Chunk
from tests.cli.run import run


def test_stdout_takes_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert main(["verify", "wörld 你好", "--json"]) == 1
    sys.stdout.flush()
    assert "wörld 你好 does not exist" in json.loads(out.getvalue())["error"]


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
