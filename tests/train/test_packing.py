"""Rows of several examples: nothing is lost or repeated, and nobody sees a neighbour."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from gptedge.train.batches import IGNORED, Batch
from gptedge.train.chat_examples import Example
from gptedge.train.model import GPT
from gptedge.train.packing import PackedExamples, pack
from tests.conftest import tiny_config


def examples(n: int, longest: int, seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(2, longest + 2, n)
    return [Example(draw.integers(0, 90, k).astype(np.int32), np.arange(k) >= k // 2) for k in sizes]


def unpacked(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every segment that is not padding."""
    assert batch.segments is not None
    found = []
    for ids, targets, segments in zip(batch.ids, batch.targets, batch.segments, strict=True):
        for number in segments.unique():
            part = segments == number
            if (targets[part] != IGNORED).any():
                found.append((ids[part].tolist(), targets[part].tolist()))
    return sorted(found)


def apart(made: list[Example]) -> list[tuple[list[int], list[int]]]:
    return sorted((e.ids[:-1].tolist(), np.where(e.learned[1:], e.ids[1:], IGNORED).tolist()) for e in made)


@pytest.mark.parametrize(("n", "longest", "context"), [(1, 5, 300), (40, 30, 300), (40, 30, 30), (7, 200, 200)])
def test_every_example_is_there_once(n: int, longest: int, context: int) -> None:
    made = examples(n, longest)
    batch = pack(made, context)
    assert unpacked(batch) == apart(made)
    assert batch.ids.shape[1] <= context


def test_little_is_padding() -> None:
    batch = pack(examples(60, 60), 2000)
    assert batch.targets.shape[1] <= 256
    assert sum(len(ids) for ids, _ in unpacked(batch)) >= 0.95 * batch.ids.numel()


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_the_loss_is_that_of_the_examples_apart(position: str) -> None:
    torch.manual_seed(0)
    model = GPT(tiny_config(90, position=position, windows=(0, 7, 0))).eval()
    made = examples(9, 40)
    together, alone = pack(made, 300), [pack([e], 300) for e in made]
    with torch.no_grad():
        losses = [float(model.loss(b.ids, b.targets, b.segments)) * b.scored for b in alone]
        whole = float(model.loss(together.ids, together.targets, together.segments))
        plain = [float(model.loss(b.ids, b.targets)) * b.scored for b in alone]
    assert whole == pytest.approx(sum(losses) / together.scored, rel=1e-5)
    assert losses == pytest.approx(plain, rel=1e-5)


def test_an_epoch_shows_everything_once_in_an_order_of_its_own() -> None:
    made = examples(23, 20)
    source = PackedExamples(made, [], batch_size=4, context=50, seed=3)
    assert source.per_epoch == 6
    epochs = [[unpacked(source.batch(e * 6 + i)) for i in range(6)] for e in range(2)]
    for epoch in epochs:
        assert {len(batch) for batch in epoch} == {3, 4}
        seen = Counter(str(part) for batch in epoch for part in batch)
        assert seen == Counter(map(str, apart(made)))
    assert epochs[0] != epochs[1]
    again = PackedExamples(made, [], batch_size=4, context=50, seed=3)
    assert unpacked(again.batch(7)) == epochs[1][1]
    other = PackedExamples(made, [], batch_size=4, context=50, seed=4)
    assert unpacked(other.batch(7)) != epochs[1][1]


def test_less_than_a_batch_is_a_smaller_batch() -> None:
    source = PackedExamples(examples(3, 9), examples(2, 9), batch_size=16, context=50, seed=0)
    assert source.per_epoch == 1
    assert len(unpacked(source.batch(5))) == 3
    assert [len(unpacked(b)) for b in source.held_out()] == [2]
