"""Windows of text: drawn by the step's number, and spread over what is held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptedge.train.batches import Batch
from gptedge.train.data import TokenData
from gptedge.train.windows import RandomWindows, spread_windows

TOKENS = np.arange(40, dtype=np.uint16)


def windows(seed: int) -> RandomWindows:
    data = TokenData(TOKENS, TOKENS[:5])
    return RandomWindows(data, batch_size=400, context=8, eval_windows=3, seed=seed)


def test_a_batch_follows_seed_and_step_and_reaches_both_ends() -> None:
    source = windows(1)
    batch = source.batch(0)
    assert batch.ids.shape == batch.targets.shape == (400, 8)
    assert (batch.ids.dtype, batch.segments, batch.scored) == (torch.int64, None, 3200)
    assert torch.equal(batch.targets, batch.ids + 1)
    assert (batch.ids.min(), batch.targets.max()) == (0, 39)
    source.batch(1)
    assert torch.equal(batch.ids, source.batch(0).ids)  # whatever was asked before
    assert not torch.equal(batch.ids, source.batch(1).ids)
    assert not torch.equal(batch.ids, windows(2).batch(0).ids)


@pytest.mark.parametrize(("count", "starts"), [(3, [0, 13, 26]), (99, [0, 4, 8, 12, 16, 20, 24, 28, 32])])
def test_held_out_windows_do_not_overlap(count: int, starts: list[int]) -> None:
    batches = spread_windows(TOKENS, count=count, context=4)
    assert [len(batch.ids) for batch in batches] == ([3] if count == 3 else [8, 1])
    ids, targets = (torch.cat([getattr(batch, side) for batch in batches]) for side in ("ids", "targets"))
    assert ids[:, 0].tolist() == starts
    assert torch.equal(targets, ids + 1)


def test_a_short_text_is_one_short_window_and_none_of_a_token() -> None:
    (batch,) = windows(0).held_out()
    assert (batch.ids.tolist(), batch.targets.tolist()) == ([[0, 1, 2, 3]], [[1, 2, 3, 4]])
    assert spread_windows(TOKENS[:1], count=4, context=8) == []


def test_rows_of_a_batch_keep_their_segments() -> None:
    ids = torch.arange(12).view(4, 3)
    rows = Batch(ids, ids + 1, ids // 2).rows(1, 3)
    assert [t.tolist() for t in (rows.ids, rows.targets)] == [[[3, 4, 5], [6, 7, 8]], [[4, 5, 6], [7, 8, 9]]]
    assert rows.segments is not None
    assert rows.segments.tolist() == [[1, 2, 2], [3, 3, 4]]
    assert Batch(ids, ids).rows(0, 1).segments is None
