"""The documentation does what it says: its Python runs, its commands and flags exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from gptedge.cli import main
from gptedge.cli.app import VERBS

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.zh-CN.md")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S)


def commands(name: str) -> list[list[str]]:
    """Every gptedge command line, as its words."""
    lines = "\n".join(blocks(name, "sh")).splitlines()
    parts = [part for line in lines for part in line.split("|")]
    words = [shlex.split(part, comments=True) for part in parts if part.strip()]
    return [w for w in words if w and w[0] == "gptedge"]


@pytest.mark.parametrize("name", READMES)
def test_commands_exist_with_their_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(name)
    assert len(found) > 10
    for words in found:
        assert words[1] in VERBS, words
        assert main([words[1], "--help"]) == 0
        page = capsys.readouterr().out
        for flag in (w for w in words[2:] if w.startswith("--")):
            assert flag in page, (words[1], flag)


@pytest.mark.parametrize("name", READMES)
def test_python_runs(
    name: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    programs = blocks(name, "python")
    assert programs
    for program in programs:
        assert '"bundle/"' in program
        exec(compile(program.replace("bundle/", str(tiny_bundle)), name, "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", READMES)
def test_both_set_up_commands_are_named(name: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in ("demo", "test"):
        assert command in targets
        assert f"make {command}" in (ROOT / name).read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_every_verb_is_documented() -> None:
    for name in READMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert [verb for verb in VERBS if f"gptedge {verb}" not in text and verb != "demo"] == []
