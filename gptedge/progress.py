"""How long work tells whoever asked for it how far it has come: one callback, for the command line and for programs."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[int, int, str], None]
"""report(done, total, note): `total` is 0 while it is unknown."""


def silent(done: int, total: int, note: str) -> None:
    """The report of those who do not ask."""
