"""One command, run in this process."""

from __future__ import annotations

import json

import pytest

from gptedge.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    assert len(out.splitlines()) == 1
    return json.loads(out)
