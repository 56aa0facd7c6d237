"""A run that is killed, or whose disk is full, goes on to exactly what it would have come to."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptedge.checkpoint import open_checkpoint
from gptedge.errors import TrainingError
from gptedge.train.config import TrainConfig
from gptedge.train.finetune import finetune
from gptedge.train.finetune_config import FinetuneConfig
from gptedge.train.run import run_training
from gptedge.train.state import load_state, save_state
from gptedge.train.trainer import StepReport
from tests.train.forked import start
from tests.train.test_run import interrupt_at, outcome

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and resource limits")


def kill_often(run: Callable[[Path], object], whole: Path, killed: Path) -> None:
    """Run to `whole`, then start or resume the same to `killed` until it is there; up to five starts are killed.

    Each after a part of the time that the whole took, so that a quick machine has not come to the end by then.
    """
    began = time.perf_counter()
    run(whole)
    took_s = time.perf_counter() - began
    draw, kills = random.Random(1), 0
    while not (killed / "config.json").exists():
        child = start(lambda: run(killed))
        child.join(took_s * (0.05 + 0.2 * draw.random()) if kills < 5 else None)
        if child.is_alive():
            child.kill()
            child.join()
            kills += 1
        else:
            assert child.exitcode == 0
    assert kills > 1


def test_killed_at_any_moment_it_comes_to_the_same_losses_and_weights(
    texts: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    """With dropout, so that the random generator counts, and early stopping, so that the best does."""
    config = replace(tiny, max_steps=120, save_every=3, eval_every=7, dropout=0.1, patience=50, schedule="trapezoid")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_often(lambda out: run_training([texts], out, config=config, resume=True), whole, killed)
    assert outcome(killed) == outcome(whole)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 0, "qat": "int4"}], ids=["lora", "full, rounded"])
def test_fine_tuning_killed_at_any_moment_comes_to_the_same(
    changes: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    data, source = tmp_path / "chat.jsonl", open_checkpoint(tiny_checkpoint)
    data.write_text(
        "".join(json.dumps({"prompt": f"What is {n}?", "completion": f"{n * n}."}) + "\n" for n in range(9))
    )
    config = FinetuneConfig(
        max_steps=60,
        batch_size=4,
        save_every=3,
        eval_every=7,
        patience=50,
        validation_fraction=0.3,
        threads=1,
        **changes,
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_often(lambda out: finetune(source, [data], out, config=config, resume=True), whole, killed)
    assert outcome(killed) == outcome(whole)


def test_fine_tuning_passes_over_a_torn_state(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data, source = tmp_path / "chat.jsonl", open_checkpoint(tiny_checkpoint)
    data.write_text('{"prompt": "What is one?", "completion": "1."}\n' * 5)
    config = FinetuneConfig(max_steps=7, batch_size=2, save_every=2, threads=1)
    finetune(source, [data], tmp_path / "whole", config=config)
    out, messages = tmp_path / "torn", list[str]()
    with pytest.raises(KeyboardInterrupt):
        finetune(source, [data], out, config=config, on_step=interrupt_at(5))
    last = out / "state" / "step-00000005.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    finetune(source, [data], out, config=config, resume=True, on_message=messages.append)
    assert "step-00000005.pt is damaged; resuming from step-00000004.pt instead" in messages
    assert outcome(out) == outcome(tmp_path / "whole")


@contextmanager
def disk_full(size: int = 50_000) -> Iterator[None]:
    """No file may grow beyond `size` bytes; a state has more than 50 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [13_000, 100_000])
def test_a_full_disk_is_the_systems_error_and_not_torchs(size: int, tmp_path: Path) -> None:
    """Where the file's buffer still holds something, closing it fails as well."""
    with disk_full(), pytest.raises(OSError, match="File too large"):
        save_state(tmp_path, {"weights": torch.zeros(size)}, step=1, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_run_and_keeps_what_it_had(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, eval_every=1000)
    run_training([texts], tmp_path / "whole", config=config)
    out, full = tmp_path / "m", disk_full()

    def fill(report: StepReport) -> None:
        if report.step == 7:
            full.__enter__()

    try:
        with pytest.raises(
            TrainingError,
            match=r"step 10: .*state cannot be written: File too large; .*step-00000005\.pt is kept; .*--resume",
        ):
            run_training([texts], out, config=config, on_step=fill)
    finally:
        full.__exit__(None, None, None)
    assert load_state(out / "state", print)["step"] == 5
    assert not [path for path in (out / "state").iterdir() if path.name.startswith(".")]
    messages: list[str] = []
    run_training([texts], out, config=config, resume=True, on_message=messages.append)
    assert "resuming after step 5" in messages
    assert outcome(out) == outcome(tmp_path / "whole")


def test_a_full_disk_as_a_run_begins_leaves_nothing(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    run_training([texts], tmp_path / "before", config=replace(tiny, max_steps=1))  # the tokens are in the cache by then
    refused = rf"{tmp_path / 'm'} cannot be written: File too large; make room there, or choose another output"
    with disk_full(100), pytest.raises(TrainingError, match=refused):
        run_training([texts], tmp_path / "m", config=tiny)
    assert not (tmp_path / "m").exists()


def test_a_full_disk_as_a_run_ends_keeps_its_last_state(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "m"
    run_training([texts], out, config=tiny)
    before = outcome(out)
    refused = rf"{out} cannot be written: File too large; .*step-00000020\.pt is kept; make room, and --resume writes"
    with disk_full(), pytest.raises(TrainingError, match=refused):
        run_training([texts], out, config=tiny, resume=True)
    assert outcome(out) == before
    (out / "config.json").unlink()
    run_training([texts], out, config=tiny, resume=True)
    assert open_checkpoint(out).config.n_layer == tiny.n_layer
    assert outcome(out) == before
