"""Guessing the next tokens from the text so far, so that one run can check several: prompt lookup (Saxena 2023).

A guess is what followed the last tokens the latest time they occurred. The model's own graph runs the guess, and each
of its rows chooses a token exactly as a step of its own would; guessed tokens count as far as they are the chosen
ones. So nothing changes but the time, sampled tokens included. Replies that repeat what was said gain most; where
nothing repeats, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable

_KEY = 3
"""Tokens that must have occurred before; shorter matches rarely go on alike."""
_STRICTEST = 8
"""Longest match that is asked for after guesses that failed."""
_FIRST, LONGEST = 3, 31
"""Tokens guessed at first, and at most: 4 and 32 rows, which kernels take in one piece."""


class PromptLookup:
    """The text so far, indexed by its triples; how long a match must be to be trusted, and how far."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._needed, self._length = _KEY, _FIRST
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """The text goes on with `token`."""
        if len(self._ids) >= _KEY:
            self._after[tuple(self._ids[-_KEY:])] = len(self._ids)
        self._ids.append(token)

    def guess(self, room: int) -> list[int]:
        """At most `room` tokens that may come next; none where the last ones are new."""
        at = self._after.get(tuple(self._ids[-_KEY:]))
        if at is None or not self._matches(at):
            return []
        period = len(self._ids) - at  # a guess longer than that goes on with itself
        return [self._ids[at + i % period] for i in range(min(room, self._length))]

    def _matches(self, at: int) -> bool:
        """Whether as many tokens as are needed are alike before `at` and at the end."""
        n = self._needed
        return n <= at and self._ids[at - n : at] == self._ids[-n:]

    def learn(self, guessed: int, right: int) -> None:
        """Of `guessed` tokens the first `right` were right: trust more after good guesses, less after bad ones."""
        if right == guessed:
            self._length = min(max(2 * guessed + 1, self._length), LONGEST)
        else:
            self._length = max(right, 1)
        if right > guessed // 2:
            self._needed = _KEY
        elif not right:
            self._needed = min(self._needed + 1, _STRICTEST)
