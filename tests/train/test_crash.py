"""A run that is killed, or whose disk is full, goes on to exactly what it would have come to."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptedge.errors import TrainingError
from gptedge.train.config import TrainConfig
from gptedge.train.run import run_training
from gptedge.train.state import load_state
from gptedge.train.trainer import StepReport
from tests.train.forked import start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and resource limits")
TIMES = ("tokens_per_second", "elapsed_s", "eta_s")


def outcome(out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    return (out / "model.safetensors").read_bytes(), timeless


def test_killed_at_any_moment_it_comes_to_the_same_losses_and_weights(
    texts: Path, tiny: TrainConfig, tmp_path: Path
) -> None:
    """With dropout, so that the random generator counts, and early stopping, so that the best does."""
    config = replace(tiny, max_steps=120, save_every=3, eval_every=7, dropout=0.1, patience=50, schedule="trapezoid")
    run_training([texts], tmp_path / "whole", config=config)
    out, draw, kills = tmp_path / "killed", random.Random(1), 0
    while not (out / "config.json").exists():
        resume = (out / "state" / "run.json").exists()
        child = start(lambda resume=resume: run_training([texts], out, config=config, resume=resume, force=True))
        time.sleep(0.15 + draw.random() * 0.7)
        if kills < 5 and child.is_alive():
            child.kill()
            kills += 1
        child.join()
        assert kills == 5 or not (out / "config.json").exists() or child.exitcode == 0
    assert kills > 1
    assert outcome(out) == outcome(tmp_path / "whole")


@contextmanager
def disk_full() -> Iterator[None]:
    """No file may grow beyond 50 kB, which a state would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_and_keeps_what_it_had(texts: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, eval_every=1000)
    run_training([texts], tmp_path / "whole", config=config)
    out, full = tmp_path / "m", disk_full()

    def fill(report: StepReport) -> None:
        if report.step == 7:
            full.__enter__()

    try:
        with pytest.raises(
            TrainingError, match=r"step 10: .*state cannot be written: .*step-00000005\.pt is kept; .*--resume"
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
