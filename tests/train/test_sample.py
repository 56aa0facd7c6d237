"""Samples leave no trace in a run: weights, losses and random numbers are those of a run without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptedge import safetensors
from gptedge.cli import main
from gptedge.errors import UsageError
from gptedge.tokenizer import Tokenizer
from gptedge.train.config import TrainConfig
from gptedge.train.model import GPT
from gptedge.train.run import run_training
from gptedge.train.sample import Sampler, write


def test_a_run_with_samples_is_bit_for_bit_the_one_without(tiny: TrainConfig, texts: Path, tmp_path: Path) -> None:
    sampler, written, losses = Sampler(3, "the cat"), [], {"with": [], "without": []}  # type: ignore[var-annotated]

    def watch(s: Any) -> None:
        losses["with"].append((s.loss, s.val_loss, s.grad_norm))
        written.append(sampler(s.step))

    run_training([texts], tmp_path / "with", config=tiny, on_step=watch, on_model=sampler.watch)
    draws = torch.rand(4)
    run_training(
        [texts], tmp_path / "without", config=tiny,
        on_step=lambda s: losses["without"].append((s.loss, s.val_loss, s.grad_norm)),
    )  # fmt: skip
    assert torch.equal(draws, torch.rand(4)), "the global generator stands where it would have"
    assert losses["with"] == losses["without"]
    a, b = (safetensors.read(tmp_path / name / "model.safetensors") for name in losses)
    assert all((a[name].read() == b[name].read()).all() for name in b)
    assert [text is not None for text in written] == [step % 3 == 0 for step in range(1, 21)]
    samples = [text for text in written if text]
    assert all(text.startswith("the cat") and len(text) > 10 for text in samples)
    assert len(set(samples)) > 1, "the model changes, and with it what it writes"


@pytest.fixture
def pair(tiny: TrainConfig, texts: Path, tmp_path: Path) -> tuple[GPT, Tokenizer]:
    seen: list[tuple[GPT, Tokenizer]] = []
    run_training(
        [texts], tmp_path / "run", config=tiny, on_model=lambda model, tokenizer: seen.append((model, tokenizer))
    )
    return seen[0]


def test_the_model_is_left_as_it_was(pair: tuple[GPT, Tokenizer]) -> None:
    model, tokenizer = pair
    for mode in (True, False):
        model.train(mode)
        before = torch.get_rng_state()
        texts = {write(model, tokenizer, "the", tokens=10, seed=seed) for seed in (0, 0, 1)}
        assert len(texts) == 2, "the same seed writes the same, another something else"
        assert model.training is mode
        assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_prompts_of_any_length_fit(pair: tuple[GPT, Tokenizer]) -> None:
    model, tokenizer = pair
    for prompt in ("", "the cat sat on the mat and then it ran up " * 5):
        assert write(model, tokenizer, prompt, tokens=100, seed=0).startswith(prompt)


def test_a_wrong_interval_is_refused(texts: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UsageError, match="sample-every is 0; it must be at least 1"):
        Sampler(0, "")
    command = ["train", "--data", str(texts), "--out", str(tmp_path / "run"), "--sample-every", "0"]
    assert main(command) == 2
    assert not (tmp_path / "run").exists()
