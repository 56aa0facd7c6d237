"""The state of a run on disk: enough to go on as if it had never stopped, and never half of it.

    state/run.json  tokenizer.json                written when the run begins; run.json again when it is resumed
    state/step-00000500.pt  step-00001000.pt      weights, optimizer, random generators, counts
    state/best-00000650.pt                        weights at the lowest validation loss

A run that goes on from one of its states needs the best weights up to there, which later ones must not have replaced.

A state is a torch file, read with `weights_only=True`, so that opening one runs no code. Its zip checksums are checked.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptedge.errors import CheckpointError
from gptedge.files import new_file

State = dict[str, Any]


def save_state(folder: Path, state: State, *, step: int, keep: int) -> Path:
    """Write the state of a step, then remove all but the latest `keep`."""
    path = folder / f"step-{step:08d}.pt"
    _write(path, state)
    for old in _states(folder)[:-keep]:
        old.unlink()
    _remove_needless_bests(folder)
    return path


def save_best(folder: Path, state: State, *, step: int) -> None:
    """Write the best weights so far; those before stay as long as a state may need them."""
    _write(folder / f"best-{step:08d}.pt", state)
    _remove_needless_bests(folder)


def load_best(folder: Path, step: int) -> State | None:
    """The weights that were the best ones at a step. None where there are none, or they are damaged."""
    return _read(folder / f"best-{step:08d}.pt")


def _remove_needless_bests(folder: Path) -> None:
    """Keep the latest, and of each state the latest that it knew."""
    bests = _steps(folder, "best")
    needed = set(bests[-1:])
    for state in _states(folder):
        needed.update([best for best in bests if _step_of(best) <= _step_of(state)][-1:])
    for old in set(bests) - needed:
        old.unlink()


def load_state(folder: Path, on_message: Callable[[str], None]) -> State | None:
    """The latest state that is whole, or None where none was saved; says which it passed over.

    Raises CheckpointError when all are damaged.
    """
    damaged: list[Path] = []
    for path in reversed(_states(folder)):
        state = _read(path)
        if state is not None:
            if damaged:
                on_message(f"{', '.join(p.name for p in damaged)} is damaged; resuming from {path.name} instead")
            return state
        damaged.append(path)
    if damaged:
        raise CheckpointError(
            f"cannot resume: all {len(damaged)} states are damaged in {folder}; "
            f"start again with --force instead of --resume"
        )
    return None


def discard_after(folder: Path, step: int) -> None:
    """Remove what is later than `step`: damaged states, which would be found before those still to be written, and the
    best weights of steps that the run will take anew."""
    for path in (*_states(folder), *_steps(folder, "best")):
        if _step_of(path) > step:
            path.unlink()


def latest_state(folder: Path) -> Path | None:
    """Whole or not; None when there is none."""
    return max(_states(folder), default=None, key=_step_of)


def _states(folder: Path) -> list[Path]:
    """Oldest first."""
    return _steps(folder, "step")


def _steps(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}-*.pt"), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _write(path: Path, state: State) -> None:
    with new_file(path) as work, work.open("wb") as f:
        try:
            torch.save(state, f)
        except RuntimeError as e:  # what torch makes of a full disk
            raise (e.__context__ if isinstance(e.__context__, OSError) else e) from None


def _read(path: Path) -> State | None:
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        return None
    return state if isinstance(state, dict) else None
