"""What the machine can do, and whether it is doing something else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptedge import train
from gptedge.config import ModelConfig
from gptedge.train import others_compute, settle_waiting
from gptedge.train.model import GPT
from gptedge.train.presets import PRESETS
from gptedge.train.utilisation import flops_per_token, peak_flops


@pytest.mark.parametrize(
    ("text", "others"),
    [("0.10 0.20 0.30 1/300 77\n", False), ("0.10 0.20 0.30 2/300 77\n", True), ("", True), (None, True)],
)
def test_others_are_seen_where_linux_counts_what_runs(text: str | None, others: bool, tmp_path: Path) -> None:
    path = tmp_path / "loadavg"
    if text is not None:
        path.write_text(text)
    assert others_compute(path) == others


@pytest.mark.parametrize(
    ("given", "others", "settled"),
    [
        ({}, False, {"GOMP_SPINCOUNT": "10000"}),
        ({}, True, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, True, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "5"}, False, {"GOMP_SPINCOUNT": "5"}),
    ],
)
def test_threads_spin_no_longer_than_others_allow(
    given: dict[str, str], others: bool, settled: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "others_compute", lambda: others)
    settle_waiting(given)
    assert given == settled


@pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU's OpenMP on Linux")
@pytest.mark.parametrize(
    "code",
    [
        "import gptedge.train.trainer",
        "from gptedge.quantize.quantizer import _loading_torch\nwith _loading_torch(): import gptedge.quantize.distill",
    ],
    ids=["training", "distilling"],
)
def test_torch_takes_what_was_settled(code: str) -> None:
    """As its thread library prints it, which names the policy PASSIVE unless it is told."""
    environment = os.environ | {"OMP_DISPLAY_ENV": "verbose"}
    environment = {k: v for k, v in environment.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert re.search(r"GOMP_SPINCOUNT = '(10000|0)'", done.stderr)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_pytorch_counts(tied: bool) -> None:
    """But for the heads' share of attention, which FlopCounterMode counts by what a kernel does."""
    from torch.utils.flop_counter import FlopCounterMode

    c: ModelConfig = PRESETS["nano"].model(vocab_size=512)
    c = ModelConfig(**{**vars(c), "tie_embeddings": tied, "context_length": 32})
    model, ids = GPT(c), torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.loss(ids, ids).backward()
    assert flops_per_token(c, model.n_parameters()) == pytest.approx(counter.get_total_flops() / 64, rel=0.02)


def test_peak_is_what_a_processor_may_reach() -> None:
    assert 1e8 < peak_flops(torch.float32, torch.device("cpu")) < 1e14
