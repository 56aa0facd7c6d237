"""A dark or a light theme on the terminal's own background, so that the app does not look like a foreign window.

Terminals tell their background colour when asked with OSC 11. All of them answer DA1 ("what are you?"), so a DA1 asked
right after tells when there is nothing more to wait for. Where nothing is told, the theme is dark and paints its own.
"""

from __future__ import annotations

import functools
import os
import re
import select
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from textual.theme import Theme

ANSWER_SECONDS = 0.6  # a slow ssh link; what comes later would be taken for keys
_ASK = "\x1b]11;?\x07\x1b[c"
_COLOUR = re.compile(
    rb"\x1b\]11;rgba?:([0-9a-f]{1,4})/([0-9a-f]{1,4})/([0-9a-f]{1,4})[^\x07\x1b]*(?:\x07|\x1b\\)", re.IGNORECASE
)
_ATTRIBUTES = re.compile(rb"\x1b\[\?[0-9;]*c")
_TERMS_NOT_TO_ASK = ("", "dumb", "linux")

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Answer:
    background: Rgb | None = None
    typed: str = ""
    """Keys that the user pressed meanwhile."""


class BackgroundQuery:
    """Asks when entered, listens on `answer`; what is done between them costs no waiting."""

    def __init__(self) -> None:
        self._before: list[object] | None = None

    def __enter__(self) -> BackgroundQuery:
        self.ask()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def ask(self) -> None:
        if os.name == "nt" or os.environ.get("TERM", "") in _TERMS_NOT_TO_ASK:
            return
        import termios
        import tty

        try:
            self._before = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin, termios.TCSANOW)  # keeps what was typed ahead
            sys.stdout.write(_ASK)
            sys.stdout.flush()
        except (OSError, termios.error):
            self._restore()

    def answer(self) -> Answer:
        if self._before is None:
            return Answer()
        try:
            return parse(self._read())
        finally:
            self._restore()

    def _read(self) -> bytes:
        fd, got = sys.stdin.fileno(), b""
        deadline = time.monotonic() + ANSWER_SECONDS
        while not _ATTRIBUTES.search(got) and (left := deadline - time.monotonic()) > 0:
            if select.select([fd], [], [], left)[0]:
                if not (some := os.read(fd, 1024)):
                    break
                got += some
        return got

    def _restore(self) -> None:
        if self._before is not None:
            import termios

            termios.tcsetattr(sys.stdin, termios.TCSANOW, self._before)  # type: ignore[arg-type]  # what tcgetattr gave
            self._before = None


def parse(got: bytes) -> Answer:
    """The colour in a terminal's answer, and what else was in between."""
    match = _COLOUR.search(got)
    colour = None
    if match:
        r, g, b = (int(part, 16) * 255 // (16 ** len(part) - 1) for part in match.groups())
        colour = (r, g, b)
    rest = _ATTRIBUTES.sub(b"", _COLOUR.sub(b"", got)).decode("utf-8", "ignore")
    return Answer(colour, "".join(c for c in rest.partition("\x1b")[0] if c.isprintable()))


def theme(background: Rgb | None) -> Theme:
    """Colours that can be read on `background`."""
    from textual.theme import Theme

    red, green, blue = background or (0x16, 0x18, 0x1D)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128
    ink = "#d8dae0" if dark else "#23262d"
    shade = functools.partial(_mix, (red, green, blue), ink)
    return Theme(
        name="gptedge",
        primary="#7aa2f7" if dark else "#2f5fc4",
        secondary="#8fb8a8" if dark else "#2e7d6b",
        accent="#7dcfb6" if dark else "#1f7a63",
        warning="#e0af68" if dark else "#9a6700",
        error="#f7768e" if dark else "#b3261e",
        success="#9ece6a" if dark else "#3b7d23",
        foreground=ink,
        background=shade(0),
        surface=shade(0.05),
        panel=shade(0.10),
        dark=dark,
        variables={
            "border": shade(0.35),
            "border-blurred": shade(0.22),
        },
    )


def _mix(ground: Rgb, ink: str, share: float) -> str:
    inks = (int(ink[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(g + (i - g) * share):02x}" for g, i in zip(ground, inks, strict=True))
