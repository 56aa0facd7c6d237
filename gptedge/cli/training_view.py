"""Watching a training run: a live view on a terminal, a line now and then elsewhere. For any trainer with StepReports.

The view takes the whole screen and gives it back, whatever ends the run; its last picture stays behind. On a narrow or
low terminal it leaves out what has no room, the curve last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gptedge.cli.common import say
from gptedge.cli.plot import Series, plot, sparkline
from gptedge.text import visible

if TYPE_CHECKING:
    from gptedge.train.trainer import OnStep, StepReport

Sampler = Callable[[int], str | None]
"""What the model writes after a step, or None where it is not its turn."""

_EVERY_S = 5.0  # between plain lines
_FRAMES = 4  # a second; one takes 4 ms
_WIDE, _NARROW = 96, 44
_LOW = 14  # rows below which there is no curve
_SPARK = 14
_LOSS, _HELD_OUT = "cyan", "bold yellow"


@contextmanager
def training_view(
    title: str, *, sampler: Sampler = lambda step: None, console: Console | None = None
) -> Iterator[OnStep]:
    """Yields what a trainer calls after each step. Everything goes to stderr."""
    console = console or Console(stderr=True)
    with _live(title, sampler, console) if _is_alive(console) else _lines(title, sampler) as on_step:
        yield on_step


def _is_alive(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal and not os.environ.get("NO_COLOR")


# ---- lines ---------------------------------------------------------------------------------------------------------


@contextmanager
def _lines(title: str, sampler: Sampler) -> Iterator[OnStep]:
    shown, held_out = time.monotonic(), ""

    def on_step(s: StepReport) -> None:
        nonlocal shown, held_out
        if s.val_loss is not None:
            held_out = f", held out {s.val_loss:.3f}"
        sample = sampler(s.step)
        if sample is not None or time.monotonic() - shown >= _EVERY_S:
            shown = time.monotonic()
            say(f"{title}: {_line(s, held_out)}")
        if sample is not None:
            say(f"{title}: step {s.step} writes: {_one_line(sample)}")

    yield on_step


def _line(s: StepReport, held_out: str) -> str:
    return (
        f"{_progress(s)}, loss {s.loss:.3f}{held_out}, {s.tokens_per_second:,.0f} tokens/s, "
        f"learning rate {s.learning_rate:.2g}, gradient {s.grad_norm:.2f}, {duration(s.eta_s)} left"
    )


def _progress(s: StepReport) -> str:
    return f"step {s.step:,}" + (f" of {s.max_steps:,}" if s.max_steps else "")


def _one_line(text: str) -> str:
    """What a model writes may hold anything, such as what a terminal takes for a command."""
    return visible(" ".join(text.split()))


def duration(seconds: float) -> str:
    """3 s, 2 m 05 s, 1 h 07 m."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02} m" if hours else f"{m} m {s:02} s" if m else f"{s} s"


# ---- the view ------------------------------------------------------------------------------------------------------


@contextmanager
def _live(title: str, sampler: Sampler, console: Console) -> Iterator[OnStep]:
    view = View(title)
    live = Live(view, console=console, screen=True, refresh_per_second=_FRAMES, vertical_overflow="crop")

    def on_step(s: StepReport) -> None:
        view.add(s)
        sample = sampler(s.step)
        if sample is not None:
            view.sample = (s.step, sample)
        if not live.is_started:  # lines about the data came before
            live.start(refresh=True)

    try:
        yield on_step
    finally:
        if live.is_started:
            live.stop()
            console.print(view)


class View:
    """What is known of the run, drawn to the size that there is."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.sample: tuple[int, str] | None = None
        """The step after which the model wrote it, and what."""
        self.latest: StepReport | None = None
        self.best: tuple[int, float] | None = None
        """Step and loss of the best measurement on held-out text."""
        self.loss, self.held_out = Series(), Series()
        self.speed, self.rate, self.norm = Series(), Series(), Series()

    def add(self, s: StepReport) -> None:
        self.latest = s
        self.loss.add(s.step, s.loss)
        self.speed.add(s.step, s.tokens_per_second)
        self.rate.add(s.step, s.learning_rate)
        self.norm.add(s.step, s.grad_norm)
        if s.val_loss is not None:
            self.held_out.add(s.step, s.val_loss)
        if s.best_step is not None and s.best_val_loss is not None:
            self.best = (s.best_step, s.best_val_loss)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.latest is None:
            return
        height = options.height or console.height
        width = options.max_width
        yield from self._head(self.latest, width)
        if width >= _WIDE and height >= _LOW:
            yield self._side_by_side(self.latest, width, height - 4)
            return
        numbers = self._numbers(self.latest, spark=width >= _NARROW)
        yield Padding(numbers, (0, 0, 1, 0))
        room = height - 5 - numbers.row_count
        sample = self._sample(width, min(5, room - 8))
        if sample is not None:
            room -= 5
        if room >= 5:
            yield self._curve(width, min(room, 18))
        if sample is not None:
            yield sample

    def _head(self, s: StepReport, width: int) -> Iterator[RenderableType]:
        times = f"{duration(s.elapsed_s)} · {duration(s.eta_s)} left"
        name = Text(self.title, "bold", no_wrap=True, overflow="crop")
        name.truncate(max(1, width - len(times) - 2), overflow="ellipsis")
        yield name.append(" " * max(2, width - name.cell_len - len(times))).append(times, "dim")
        share = s.elapsed_s / ((s.elapsed_s + s.eta_s) or 1)
        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_row(ProgressBar(total=1.0, completed=share), Text(f"{share:.0%}  {_progress(s)}"))
        yield line
        yield Text()

    def _side_by_side(self, s: StepReport, width: int, height: int) -> RenderableType:
        right = 46
        numbers = self._numbers(s, spark=True)
        sample = self._sample(right, height - numbers.row_count - 1)
        grid = Table.grid(padding=0)
        for column in (width - right - 2, 2, right):
            grid.add_column(width=column)
        beside: list[RenderableType] = [numbers]
        if sample is not None:
            beside += [Text(), sample]
        grid.add_row(self._curve(width - right - 2, min(height, 24)), "", Group(*beside))
        return grid

    def _curve(self, width: int, height: int) -> RenderableType:
        """The plot under its legend; `height` rows in all."""
        legend = Text("⣀⠤⠒ ", _LOSS).append("loss, nats a token", "dim")
        marks = self.held_out.points()
        if len(marks):
            legend.append("   ● ", _HELD_OUT).append("held out", "dim")
        drawn = plot(self.loss.points(), marks, width=width, height=height - 1, line_style=_LOSS, mark_style=_HELD_OUT)
        return Group(legend, drawn)

    def _numbers(self, s: StepReport, *, spark: bool) -> Table:
        held_out = self.held_out.points()
        best = f"best {self.best[1]:.3f} at {self.best[0]:,}" if self.best else "not measured yet"
        rows: list[tuple[str, str, str]] = [
            ("loss", f"{s.loss:.3f}", sparkline(self.loss.points()[:, 1], _SPARK)),
            ("held out", f"{held_out[-1, 1]:.3f}" if len(held_out) else "–", best),
            ("tokens/s", f"{s.tokens_per_second:,.0f}", sparkline(self.speed.points()[:, 1], _SPARK)),
            ("learning rate", f"{s.learning_rate:.2e}", sparkline(self.rate.points()[:, 1], _SPARK)),
            ("gradient norm", f"{s.grad_norm:.2f}", sparkline(self.norm.points()[:, 1], _SPARK)),
        ]
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", style="bold", no_wrap=True)
        table.add_column(style="dim", no_wrap=True, overflow="crop")
        for name, value, more in rows:
            table.add_row(name, value, more if spark else "")
        return table

    def _sample(self, width: int, height: int) -> Panel | None:
        """What the model wrote, as much of it as there is room for; None where there is none."""
        if self.sample is None or height < 3:
            return None
        step, text = self.sample
        lines = Text(_one_line(text)).wrap(Console(width=width), width - 4)
        kept = list(lines)[: height - 2]
        if len(kept) < len(lines):
            kept[-1].truncate(width - 5)
            kept[-1].append("…")
        shown = Text("\n").join(kept)
        return Panel(shown, title=f"after step {step:,} it writes", title_align="left", border_style="dim", width=width)
