"""Blockwise attention against PyTorch's own, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptedge.train import model
from gptedge.train.blockwise import BLOCK, LONGEST, blockwise_attention, pays


def made(heads: int, t: int, d: int = 16) -> Tensor:
    """[2, heads, t, d], laid out as the products leave it."""
    return torch.randn(2, t, heads, d).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("t", [BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 7])
@pytest.mark.parametrize(("kv_heads", "scale"), [(4, None), (2, 0.3)])
def test_result_and_gradients_are_those_of_pytorch(t: int, kv_heads: int, scale: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = made(4, t), made(kv_heads, t), made(kv_heads, t)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    y = blockwise_attention(q, k, v, scale)
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)
    dy = torch.randn_like(y)
    for own, theirs in zip(*(torch.autograd.grad(out, (q, k, v), dy) for out in (y, expected)), strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=2e-5)


def test_attend_takes_it_for_training_on_plain_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(model, "blockwise_attention", lambda q, *_: taken.append(1) or q)
    q = made(2, 2 * BLOCK)
    model.attend(q, q, q, window=9), model.attend(q, q, q, softcap=5.0)
    model.attend(q, q, q, same=torch.ones(2, 1, 2 * BLOCK, 2 * BLOCK, dtype=torch.bool))
    assert not taken
    model.attend(q, q, q)
    assert taken


def test_it_pays_where_gradients_are_wanted_of_float32_rows_of_some_length() -> None:
    q = made(2, 2 * BLOCK)
    assert pays(q, q)
    others = [q.detach(), q.bfloat16(), made(2, BLOCK), made(1, LONGEST + 1, 1)]
    assert not any(pays(other, other) for other in others)
    assert not pays(q, made(2, 3 * BLOCK))
