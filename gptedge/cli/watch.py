"""What the verbs that train have in common: the options of watching, and the callbacks that come of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptedge.cli.common import needs, say

if TYPE_CHECKING:
    from gptedge.train.sample import OnModel
    from gptedge.train.trainer import OnStep, StepReport

SampleEvery = Annotated[int | None, typer.Option(help="Steps between samples of what the model writes.")]
SamplePrompt = Annotated[str, typer.Option(help="How the samples begin.")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard event files into OUT/tensorboard.")]


@contextmanager
def watching(
    title: str, events_folder: Path, *, sample_every: int | None, sample_prompt: str, events: bool
) -> Iterator[tuple[OnModel | None, OnStep]]:
    """A live view, or lines; samples and event files if wanted. Yields what takes a run's model, and each step."""
    from gptedge.cli.training_view import training_view
    from gptedge.train.sample import Sampler

    sampler = None if sample_every is None else Sampler(sample_every, sample_prompt)
    with ExitStack() as stack:
        steps: list[OnStep] = []
        if events:
            with needs("tensorboard"):
                from gptedge.train.tensorboard import event_file
            steps.append(stack.enter_context(event_file(events_folder)))
            if os.environ.get("RANK", "0") == "0":
                say(f"see it with: tensorboard --logdir {events_folder}")
        steps.append(stack.enter_context(training_view(title, sampler=sampler or (lambda step: None))))

        def on_step(s: StepReport) -> None:
            for each in steps:
                each(s)

        yield sampler.watch if sampler else None, on_step
