"""Where a recipe that takes long keeps what it goes on from when it was stopped.

    .OUT.distill-KEY/start/         the graph as rounding left it
    .OUT.distill-KEY/windows.npy    the text, as token ids
    .OUT.distill-KEY/step-*.pt      the state of the training, written whole or not at all
    .OUT.distill-KEY/log.jsonl      a line for each step

The folder stands beside the destination and goes when that is complete. KEY stands for everything that the result
depends on, so the same command goes on where it stopped, and another one begins anew.
"""

from __future__ import annotations

import glob
import hashlib
import shutil
from pathlib import Path

START = "start"


def work_folder(out: Path, *settings: object) -> Path:
    """For `out` with these settings, whose repr() must say all of them."""
    return out.parent / f".{out.name}.distill-{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}"


def kept_work(out: Path) -> list[Path]:
    """The folders of all runs for `out` that were stopped."""
    return list(out.parent.glob(f".{glob.escape(out.name)}.distill-*"))


def remove_work(out: Path) -> None:
    for folder in kept_work(out):
        shutil.rmtree(folder, ignore_errors=True)
