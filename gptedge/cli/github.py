"""What a command tells GitHub Actions: a summary on the job's page, and marks for what failed.

Both do nothing elsewhere. Formats: GitHub's documentation, "Workflow commands for GitHub Actions".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptedge.cli.common import say

_DATA = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_PROPERTY = {**_DATA, ":": "%3A", ",": "%2C"}


def mark_error(title: str, message: str, *, as_json: bool) -> None:
    """An error on the workflow run's page. GitHub reads both streams; stdout belongs to the object with --json."""
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return
    line = f"::error title={_escape(title, _PROPERTY)}::{_escape(message, _DATA)}"
    print(line, file=sys.stderr if as_json else sys.stdout, flush=True)


def summarize(subject: str, gates: Sequence[tuple[str, str, str, str]], facts: Mapping[str, Any]) -> None:
    """Append the verdicts (gate, value, bound, word) and the facts to the file $GITHUB_STEP_SUMMARY, if it is set."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    rows = [[*map(_cell, gate[:3]), ("✅ " if gate[3] == "ok" else "❌ ") + gate[3]] for gate in gates]
    measured = [[_cell(name), _cell(value)] for name, value in _flat(facts)]
    text = "\n".join(
        [
            f"### {_cell(subject)}",
            "",
            *_table(["gate", "value", "bound", "verdict"], rows),
            "",
            *_table(["fact", "value"], measured),
            "",
            "",
        ]
    )
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as e:  # the verdict counts, not its picture
        say(f"the summary could not be written to {path}: {e.strerror}")


def _escape(text: str, replacements: Mapping[str, str]) -> str:
    return "".join(replacements.get(c, c) for c in text)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _cell(value: object) -> str:
    """A value as the text of a table's cell: on one line, and not as Markdown."""
    text = " ".join((f"{value:.6g}" if isinstance(value, float) else str(value)).split())
    for character in "\\`*_|<>[]":
        text = text.replace(character, f"\\{character}")
    return text


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names in dotted keys, and values."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{name}", " to ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in value)
        else:
            yield f"{prefix}{name}", value
