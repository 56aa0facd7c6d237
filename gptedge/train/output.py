"""The folder that a training run writes: begun, reopened to be resumed, and at the end turned into a checkpoint.

    OUT/config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json    the checkpoint
    OUT/metrics.jsonl    a line for each step
    OUT/state/           what --resume continues from

The checkpoint appears when the training is done; until then, OUT has only metrics and state. With `force`, an older
checkpoint in OUT stays until the new one takes its place, and files that are not a checkpoint's are left alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from gptedge.checkpoint import CONFIG, SIDE_FILES, TOKENIZER, WEIGHTS, WEIGHTS_INDEX, read_json_object
from gptedge.errors import CheckpointError, OutputExistsError, TrainingError, UsageError
from gptedge.files import check_writable, new_file, new_folder, write_json, writing
from gptedge.lora_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gptedge.train.settings import RESUMABLE_CHANGES, LoopConfig
from gptedge.train.state import discard_after, latest_state, load_state
from gptedge.train.trainer import OnMessage, Trainer, cut_metrics

STATE, METRICS, RUN = "state", "metrics.jsonl", "run.json"
_OWN = (RUN, TOKENIZER, "step-*.pt", "best-*.pt", ".*.partial", ".*.old")
"""What lies in OUT/state, as patterns."""
TENSORBOARD, EVENTS = "tensorboard", "events.out.tfevents.*"

Config = TypeVar("Config", bound=LoopConfig)


def check_output(out: Path, *, resume: bool, force: bool, on_message: OnMessage) -> bool:
    """Before anything is done: whether to go on with the run in `out`, rather than to begin one.

    Raises CheckpointError, UsageError, OutputExistsError.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, and the output is a folder; choose another output")
    there = has_run(out)
    if out.exists() and not (resume or force):
        hint = "go on with it by --resume, " if there else ""
        raise OutputExistsError(f"{out} exists already; {hint}choose another output or add --force")
    check_writable(out, TrainingError)
    if not (resume and there) and (strange := _strange(out / STATE)):
        raise OutputExistsError(f"{strange} is no run's, and a run would replace it; choose another output")
    if resume and not there:
        if not (force or _is_fresh(out)):
            raise CheckpointError(f"cannot resume: {out} holds no run; choose another output or add --force")
        on_message(f"{out} holds no run yet: beginning")
    return resume and there


def _strange(state: Path) -> Path | None:
    """What no run wrote of what a new one would replace."""
    if not state.is_dir():
        return state if state.exists() else None
    return next((p for p in state.iterdir() if not any(fnmatch(p.name, own) for own in _OWN)), None)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Within, no other process trains in `out`, which is made. Raises UsageError where one does.

    The lock ends with the process, however it ends. Where the system knows no such locks, there is none.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    made = not out.exists()
    with writing(out, TrainingError, "choose another output"):
        out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                made = False
                raise UsageError(f"another process trains in {out}; let it end, or choose another output") from None
        yield
    finally:
        if made:  # and nothing came of it; still locked, so that it is no other's yet
            with suppress(OSError):
                out.rmdir()
        os.close(folder)


def has_run(out: Path) -> bool:
    """Whether there is one to resume."""
    return (out / STATE / RUN).is_file()


def _is_fresh(out: Path) -> bool:
    """With nothing in it but what a run leaves that was killed as it began."""
    return not out.exists() or all(path.name.startswith(f".{STATE}.") for path in out.iterdir())


def begin_run(out: Path, config: LoopConfig, identity: Mapping[str, str], save: Callable[[Path], None]) -> None:
    """Write OUT/state, into which `save` puts what else the run has settled.

    `identity` is what a resumed run must find the same, by name: digests of its data, of the model it began with.
    """
    try:
        with writing(out, TrainingError, "make room there, or choose another output"):
            for old in (out / METRICS, *(out / TENSORBOARD).glob(EVENTS)):
                old.unlink(missing_ok=True)
            with new_folder(out / STATE, force=True) as folder:
                save(folder)
                write_json(folder / RUN, {"config": config.to_dict(), **identity})
    finally:
        with suppress(OSError):
            out.rmdir()  # if it is empty: it would be in the way of the next run


def saved_config(out: Path, kind: type[Config]) -> Config:
    """What the run in `out` began with, or was last resumed with."""
    path = Path(out) / STATE / RUN
    settings = read_json_object(path).get("config")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} has no config; start the run again with --force instead of --resume")
    if not settings.keys() <= {f.name for f in fields(kind)}:
        raise UsageError(f"{out} is no run of this version's gptedge {kind.VERB}; resume it with what began it")
    return kind.from_dict(settings, where=str(path))


def reopen_run(out: Path, config: LoopConfig, identity: Mapping[str, str]) -> None:
    """Refuses another configuration, or another identity, than the run in `out` began with.

    What may differ is written down, so that resuming once more goes on with it.
    """
    before = saved_config(out, type(config))
    for name, value in config.to_dict().items():
        old = getattr(before, name)
        if value != old and name not in RESUMABLE_CHANGES:
            raise UsageError(f"cannot resume with {name} {value!r}: the run began with {old!r}; leave it as it was")
    saved = read_json_object(out / STATE / RUN)
    for name, digest in identity.items():
        if saved.get(name) != digest:
            noun = name.removesuffix("_sha256").replace("_", " ")
            raise CheckpointError(f"cannot resume: the {noun} is not what the run in {out} began with")
    with writing(out, TrainingError, "make room and go on with --resume"), new_file(out / STATE / RUN) as work:
        write_json(work, saved | {"config": config.to_dict()})


def resume_trainer(trainer: Trainer, out: Path, on_message: OnMessage) -> None:
    """Go on from the latest state that is whole; from the beginning when the run ended before it saved its first."""
    state = load_state(out / STATE, on_message)
    if state is not None:
        trainer.restore(state)
        on_message(
            f"the run had ended at step {trainer.step:,} already: its weights are written again; "
            f"give a larger {trainer.used_up} to go on"
            if trainer.is_done
            else f"resuming after step {trainer.step:,}"
        )
    else:
        on_message("the run had saved no state yet: beginning again at its first step")
    if trainer.processes.leads:
        cut_metrics(out / METRICS, trainer.step)
        discard_after(out / STATE, trainer.step)


def precision_line(trainer: Trainer) -> str:
    """What is said of the trainer's precision, and why."""
    how = "bfloat16 matrix products" if trainer.precision == "bf16" else "float32"
    why = "as asked" if trainer.config.precision != "auto" else "the faster on this processor"
    return f"{how}, {why}"


def put_checkpoint(out: Path, write: Callable[[Path], None]) -> None:
    """Have a checkpoint written into a folder aside, then put it in the place of what OUT may hold of another."""
    kept = f"{latest_state(out / STATE)} is kept"
    with writing(out, TrainingError, f"{kept}; make room, and --resume writes the checkpoint"):
        aside = out / ".checkpoint"
        with new_folder(aside, force=True) as folder:
            write(folder)
        # No config.json, no checkpoint: it goes first and comes last, so that none is ever half old and half new.
        for name in (CONFIG, WEIGHTS, WEIGHTS_INDEX, ADAPTER_CONFIG, ADAPTER_WEIGHTS, *SIDE_FILES):
            (out / name).unlink(missing_ok=True)
        for file in sorted(aside.iterdir(), key=lambda file: file.name == CONFIG):
            file.rename(out / file.name)
        aside.rmdir()
