"""Guessing the next tokens from the text so far, so that one run can check several: prompt lookup (Saxena 2023).

The text is taken to go on as it did before, at a place that is kept as long as both go on alike. A new one is where the
last three tokens, or else the last two, occurred the latest time. But a text that copies another departs from it by a
word left out, put in or replaced, and comes back: so for some tokens after a departure the last one is looked for
shortly behind the place that was left, and the text is taken to go on from there.

    the text:   the gulls gather on the empty stalls, and the old keeper winds the clock in the tower
                                 left ──┘           └ back       left ─┘ └ back
    its copy:   the gulls gather on the stalls, and the old tired keeper winds the clock in the tower

The model's own graph runs the guess, and each of its rows chooses a token exactly as a step of its own would; guessed
tokens count as far as they are the chosen ones. So nothing changes but the time, sampled tokens included. Replies that
repeat what was said gain most; where nothing repeats, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable

_FEWEST, _KEY, _SURE = 2, 3, 5
"""Alike tokens asked for after a right guess, at first, and at most, as each wrong guess asks for one more.

What followed the last two was right for 50% of tokens when copying, 39% in free text, 24% behind long prompts; the last
three 80, 72 and 32%. A place that goes on alike for as many as are ever asked for is one that the text copies from.
"""
_NEARBY = 8
"""For how many tokens after a departure the last one is looked for, and among how many from the place left on.

What followed it there was right for 59% when copying, so that such a place counts as one found by `_KEY` tokens.
"""
_SHORTEST, LONGEST = 3, 31
"""Tokens guessed at least, and at most: 4 and 32 rows, which kernels take in one piece."""


class PromptLookup:
    """The text so far, indexed by its pairs and triples; a place where it went on alike, and how far it did."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._place, self._alike = 0, 0  # no tokens alike: no place
        self._left, self._left_at = 0, -_NEARBY
        self._needed = _KEY
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """The text goes on with `token`."""
        ids, end = self._ids, len(self._ids)
        if end >= 2:
            self._after[ids[-2], ids[-1]] = end
        if end >= 3:
            self._after[ids[-3], ids[-2], ids[-1]] = end
        ids.append(token)
        if self._alike and ids[self._place] == token:
            self._place += 1
            self._alike += 1
            return
        if self._alike >= _SURE:
            self._left, self._left_at = self._place, end
        self._look_up()

    def _look_up(self) -> None:
        """Where the text may go on; how many tokens are alike before there and at the end."""
        at = self._after.get(tuple(self._ids[-3:])) or self._near()
        self._alike = _KEY if at else 0
        self._place = at or self._after.get(tuple(self._ids[-2:]), 0)
        self._alike = max(self._alike, self._alike_before(self._place))

    def _near(self) -> int:
        """What followed the last token, or rather the last two, shortly behind the place left; 0 where they are not."""
        ids = self._ids
        if len(ids) - self._left_at > _NEARBY:
            return 0
        found = [j + 1 for j in range(self._left, min(self._left + _NEARBY, len(ids) - 1)) if ids[j] == ids[-1]]
        return max(found, key=lambda at: ids[at - 2] == ids[-2], default=0)

    def _alike_before(self, at: int) -> int:
        """Tokens alike before `at` and at the end, counted up to what is always enough."""
        n = 0
        while n < min(at, _SURE) and self._ids[at - 1 - n] == self._ids[-1 - n]:
            n += 1
        return n

    def guess(self, room: int) -> list[int]:
        """At most `room` tokens that may come next, as many as were alike; none where the last ones are new."""
        if self._alike < self._needed:
            return []
        period = len(self._ids) - self._place  # a guess longer than that goes on with itself
        length = min(max(self._alike, _SHORTEST), LONGEST, room)
        return [self._ids[self._place + i % period] for i in range(length)]

    def learn(self, right: int) -> None:
        """Of the tokens guessed the first `right` were right: where none was, one more must be alike from now on."""
        self._needed = _FEWEST if right else min(self._needed + 1, _SURE)
