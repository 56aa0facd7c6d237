"""Which messages of a chat its prompt is made of: all of them, or those that a full context has left.

A turn begins with a user's message. The system message and the last turn always stay; older turns go, oldest first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

Messages = list[dict[str, str]]


class Turns:
    """The prompt of one reply: `text` as the template writes it, and `ids`."""

    def __init__(
        self,
        messages: Messages,
        dropped: int,
        render: Callable[[Messages], str],
        encode: Callable[[str], list[int]],
    ) -> None:
        """`dropped` messages after the system message are left out from the beginning."""
        self._system = [m for m in messages[:1] if m["role"] == "system"]
        self._rest = messages[len(self._system) :]
        self._render, self._encode = render, encode
        self.dropped = dropped if dropped in self._starts() else 0
        self.text, self.ids = self._prompt(self.dropped)

    def shorten(self, generated: Sequence[int], most: int) -> list[int] | None:
        """As `Shortener.shorten` says: the fewest turns go that must."""
        starts = [start for start in self._starts() if start > self.dropped]
        if not starts:
            return None
        at = bisect_left(starts, len(generated) - most, key=lambda start: -len(self._prompt(start)[1]))
        self.dropped = starts[min(at, len(starts) - 1)]
        self.text, self.ids = self._prompt(self.dropped)
        return [*self.ids, *generated]

    def _starts(self) -> list[int]:
        return [i for i, m in enumerate(self._rest) if m["role"] == "user"]

    def _prompt(self, dropped: int) -> tuple[str, list[int]]:
        text = self._render([*self._system, *self._rest[dropped:]])
        return text, self._encode(text)
