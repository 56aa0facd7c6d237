"""What gives way when a context is full: nothing, or the oldest part of the text.

    system prompt │ oldest … │ newest … │ reply so far     is read again as     system prompt │ newest … │ reply so far

Keys are kept rotated to their positions (arXiv:2104.09864), so that a text which loses a part is run again from there
on. That costs a prefill of what is kept; to pay it rarely, so much is left out at once that half the context is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Shortener(Protocol):
    def shorten(self, generated: Sequence[int], most: int) -> list[int] | None:
        """Token ids of the prompt and of what was generated since, with so much of the oldest left out that at most
        `most` remain, or as few as there can be; None when nothing can be left out."""


class PlainText:
    """A text without turns: its first `keep` tokens stay, and of the rest the newest."""

    def __init__(self, ids: Sequence[int], keep: int) -> None:
        self._ids, self._keep = list(ids), keep

    def shorten(self, generated: Sequence[int], most: int) -> list[int] | None:
        whole = [*self._ids, *generated]
        if len(whole) <= max(most, self._keep + 1):
            return None
        newest = max(most - self._keep, 1)
        return whole[: self._keep] + whole[-newest:]


class Window:
    """The part of a growing text that is in the context: `ids`. `dropped` counts the tokens left out so far."""

    def __init__(self, ids: Sequence[int], context_length: int, shortener: Shortener | None) -> None:
        """A prompt that does not fit is shortened at once, where it can be."""
        self.ids = list(ids)
        self.dropped = 0
        self._n_prompt = len(self.ids)
        self._context_length, self._shortener = context_length, shortener
        if len(self.ids) >= context_length:
            self.shift([])

    @property
    def room(self) -> int:
        return self._context_length - len(self.ids)

    def shift(self, generated: Sequence[int]) -> bool:
        """Make room for more than the prompt and `generated`; whether there is some now. False without a shortener."""
        shorter = self._shortener and self._shortener.shorten(generated, self._context_length // 2)
        if not shorter or len(shorter) >= self._context_length:
            return False
        self.dropped = self._n_prompt + len(generated) - len(shorter)
        self.ids = shorter
        return True
