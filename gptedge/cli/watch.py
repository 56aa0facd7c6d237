"""What the verbs that train have in common: the options of watching, and the callbacks that come of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptedge.cli.common import needs, say
from gptedge.text import counted

if TYPE_CHECKING:
    from gptedge.train.finetune import FinetuneResult
    from gptedge.train.run import TrainResult
    from gptedge.train.sample import OnModel
    from gptedge.train.trainer import OnMessage, OnStep, StepReport

SampleEvery = Annotated[int | None, typer.Option(help="Steps between samples of what the model writes.")]
SamplePrompt = Annotated[str, typer.Option(help="How the samples begin.")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard event files into OUT/tensorboard.")]


@contextmanager
def watching(
    title: str, events_folder: Path, *, sample_every: int | None, sample_prompt: str, events: bool
) -> Iterator[tuple[OnModel | None, OnStep, OnMessage]]:
    """A live view, or lines; samples and event files if wanted.

    Yields what takes a run's model, each step, and each message: said at once, or behind the view once that is open.
    """
    from gptedge.cli.training_view import training_view
    from gptedge.train.sample import Sampler

    sampler = None if sample_every is None else Sampler(sample_every, sample_prompt)
    last: list[str] = []
    with ExitStack() as stack:
        stack.callback(_say_all, last)  # the view is closed by then
        begun = False
        watchers: list[OnStep] = []
        if events:
            with needs("tensorboard"):
                from gptedge.train.tensorboard import event_file
            watchers.append(stack.enter_context(event_file(events_folder)))
            if os.environ.get("RANK", "0") == "0":
                say(f"see it with: tensorboard --logdir {events_folder}")
        watchers.append(stack.enter_context(training_view(title, sampler=sampler or (lambda step: None))))

        def on_step(s: StepReport) -> None:
            nonlocal begun
            begun = True
            for each in watchers:
                each(s)

        yield sampler.watch if sampler else None, on_step, lambda message: (last.append if begun else say)(message)


def _say_all(messages: list[str]) -> None:
    for message in messages:
        say(message)


def outcome(result: TrainResult | FinetuneResult) -> str:
    """Of a run: its steps, whose weights were written where they are not the last's, and its losses."""
    best = "" if result.weights_step == result.steps else f" (weights of step {result.weights_step}, the best)"
    held_out = "" if result.val_loss is None else f", {result.val_loss:.3f} held out"
    return f"{counted(result.steps, 'step')}{best}, loss {result.loss:.3f}{held_out}"
