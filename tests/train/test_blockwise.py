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


def test_in_bfloat16_it_errs_by_little_more_than_pytorch_does() -> None:
    torch.manual_seed(0)
    inputs = [made(4, 3 * BLOCK - 7).bfloat16().detach().requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    dy = torch.randn(2, 4, 3 * BLOCK - 7, 16).bfloat16()

    def outcome(y: Tensor, of: list[Tensor]) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y, of, dy.to(y.dtype))]

    def errors(y: Tensor) -> list[float]:
        expected = outcome(F.scaled_dot_product_attention(*exact, is_causal=True), exact)
        pairs = zip(outcome(y, inputs), expected, strict=True)
        return [float((own.double() - right).norm() / right.norm()) for own, right in pairs]

    theirs = errors(F.scaled_dot_product_attention(*inputs, is_causal=True))
    for own, other in zip(errors(blockwise_attention(*inputs, None)), theirs, strict=True):
        assert own < max(1.5 * other, 0.006), (own, other)
        assert own > 1e-4  # otherwise it was not computed in bfloat16


def test_attend_takes_it_for_training_on_plain_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(model, "blockwise_attention", lambda q, *_: taken.append(1) or q)
    q = made(2, 2 * BLOCK)
    model.attend(q, q, q, window=9), model.attend(q, q, q, softcap=5.0)
    model.attend(q, q, q, same=torch.ones(2, 1, 2 * BLOCK, 2 * BLOCK, dtype=torch.bool))
    assert not taken
    model.attend(q, q, q)
    assert taken


def test_it_pays_where_gradients_are_wanted_of_rows_of_some_length() -> None:
    q = made(2, 2 * BLOCK)
    assert pays(q, q)
    assert pays(q.bfloat16(), q.bfloat16())
    others = [q.detach(), q.half(), made(2, BLOCK), made(1, LONGEST + 1, 1)]
    assert not any(pays(other, other) for other in others)
    assert not pays(q, made(2, 3 * BLOCK))
    assert not pays(q, q.bfloat16())
