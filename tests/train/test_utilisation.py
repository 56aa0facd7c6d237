"""What the machine can do, and whether it is doing something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptedge.config import ModelConfig
from gptedge.train import others_compute
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
