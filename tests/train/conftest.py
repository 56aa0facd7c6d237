"""A text and a model small enough that a run takes a second, on one thread: on busy cores two wait for each other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptedge.train.config import TrainConfig

TINY: dict[str, Any] = {
    "vocab_size": 300,
    "context_length": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_kv_head": 1,
    "n_embd": 32,
    "n_ff": 64,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "max_steps": 20,
    "eval_every": 6,
    "save_every": 5,
    "threads": 1,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny() -> TrainConfig:
    return TrainConfig(**TINY)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 documents, 30 kB in all."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    sentence = "the cat sat on a mat and then it ran up to see what was there in the garden 中文 café 🙂"
    words = sentence.split()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(" ".join(draw.choices(words, k=250)) + "\n", encoding="utf-8")
    return folder
