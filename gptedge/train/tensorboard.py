"""TensorBoard event files of a run, beside its metrics.jsonl. tensorboardX writes them, and brings no Rust; TensorBoard
itself, which reads them, is the user's to install.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

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
    """
    writer: Any = None

    def on_step(s: StepReport) -> None:
        nonlocal writer
        if writer is None:
            writer = _open(folder, s.step)
        for tag, name in _TAGS.items():
            if (value := getattr(s, name)) is not None:
                writer.add_scalar(tag, value, s.step)

    try:
        yield on_step
    finally:
        if writer is not None:
            writer.close()


def _open(folder: Path, step: int) -> Any:
    if step == 1:
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
    return SummaryWriter(
        logdir=str(folder),
        purge_step=step if step > 1 else None,
        flush_secs=_FLUSH_S,
        filename_suffix=f".{step}",  # files of one second would overwrite each other
    )
