"""TensorBoard event files of a run, beside its metrics.jsonl. tensorboardX writes them, and brings no Rust; TensorBoard
itself, which reads them, is the user's to install.

They are written by the thread that trains: one of tensorboardX's own would die of a full disk unseen, and the training
then wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from gptedge.errors import TrainingError
from gptedge.files import writing
from gptedge.train.output import EVENTS
from gptedge.train.trainer import StepReport

_FLUSH_S = 10
_TAGS = {
    "loss/train": "loss",
    "loss/held_out": "val_loss",
    "schedule/learning_rate": "learning_rate",
    "gradient/norm": "grad_norm",
    "speed/tokens_per_second": "tokens_per_second",
}


@contextmanager
def event_file(folder: Path) -> Iterator[Callable[[StepReport], None]]:
    """Yields what writes one step's numbers. The file appears at the first step, and is whole when the block ends.

    A run from its first step replaces what an older one left; a resumed one tells TensorBoard from where it goes on.
    Raises TrainingError where they cannot be written.
    """
    writer: Any = None
    flushed = time.monotonic()

    def on_step(s: StepReport) -> None:
        nonlocal writer, flushed
        with writing(folder, TrainingError, "make room and go on with --resume, or leave --tensorboard out"):
            if writer is None:
                writer = _open(folder, s.step)
            for tag, name in _TAGS.items():
                if (value := getattr(s, name)) is not None:
                    writer.write_event(Event(wall_time=time.time(), step=s.step, summary=scalar(tag, value)))
            if time.monotonic() - flushed >= _FLUSH_S:
                writer.flush()
                flushed = time.monotonic()

    try:
        yield on_step
    finally:
        if writer is not None:
            with suppress(OSError):  # a full disk has been told of, and the run's weights are what counts
                writer.close()


def _open(folder: Path, step: int) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    if step == 1:
        for old in folder.glob(EVENTS):
            old.unlink()
    writer = EventsWriter(str(folder / "events"), f".{step}")  # files of one second would overwrite each other
    if step > 1:
        writer.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
    return writer
