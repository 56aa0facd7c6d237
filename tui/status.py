"""The one line of facts below the conversation: model, recipe, what is going on, context used, speed.

`line` decides what is shown where it does not all fit; the widget only draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rich.cells import cell_len, set_cell_size
from textual.content import Content
from textual.timer import Timer
from textual.widgets import Static

FLASH_SECONDS = 2.5
NEARLY_FULL = 0.9


@dataclass(frozen=True)
class Facts:
    name: str
    recipe: str = ""
    state: str = ""
    used_tokens: int = 0
    context_length: int = 0
    tokens_per_s: float = 0.0
    ttft_ms: float = 0.0

    @property
    def is_nearly_full(self) -> bool:
        return bool(self.context_length) and self.used_tokens >= NEARLY_FULL * self.context_length


def line(facts: Facts, width: int) -> tuple[str, str]:
    """What stands at the left and at the right, together `width` cells at most, the less important left out first."""
    left = [facts.state or facts.name]
    second = facts.name if facts.state else facts.recipe
    optional_left = [second] if second else []
    right = _numbers(facts)
    while True:
        texts = " · ".join([*left, *optional_left]), " · ".join(right)
        if cell_len(texts[0]) + cell_len(texts[1]) + 2 <= width:
            return texts
        if len(right) > 1:
            right.pop()
        elif optional_left:
            optional_left.pop()
        elif right:
            right.pop()
        else:
            return set_cell_size(texts[0], width).rstrip(), ""


def _numbers(facts: Facts) -> list[str]:
    """The most important first."""
    numbers = []
    if facts.context_length:
        numbers.append(f"{facts.used_tokens:,} / {facts.context_length:,} tokens")
    if facts.tokens_per_s:
        numbers.append(f"{facts.tokens_per_s:.{0 if facts.tokens_per_s >= 10 else 1}f} tok/s")
    if facts.ttft_ms:
        numbers.append(f"first after {facts.ttft_ms / 1000:.2f} s")
    return numbers


class Status(Static):
    def __init__(self, facts: Facts) -> None:
        super().__init__(markup=False)
        self.facts = facts
        self._flash = ""
        self._timer: Timer | None = None

    def set(self, **changes: Any) -> None:
        """Change some facts."""
        self.facts = replace(self.facts, **changes)
        if "state" in changes:  # what was flashed is out of date
            self._flash = ""
        self.refresh()

    def flash(self, text: str) -> None:
        """Show `text` for a moment."""
        if self._timer is not None:
            self._timer.stop()
        self._flash = text
        self._timer = self.set_timer(FLASH_SECONDS, self._unflash)
        self.refresh()

    def _unflash(self) -> None:
        self._flash = ""
        self.refresh()

    def render(self) -> Content:
        facts = replace(self.facts, state=self._flash or self.facts.state)
        left, right = line(facts, self.size.width)
        gap = " " * (self.size.width - cell_len(left) - cell_len(right))
        return Content.assemble(
            (left, "$accent" if facts.state else ""), gap, (right, "$warning" if facts.is_nearly_full else "")
        )
