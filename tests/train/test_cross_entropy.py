"""The cross-entropy that leaves its gradient in the logits, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptedge.train import cross_entropy, model
from gptedge.train.batches import IGNORED
from gptedge.train.cross_entropy import in_place_cross_entropy, in_place_pays
from gptedge.train.model import GPT
from gptedge.train.presets import PRESETS

V = 40


def computed(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient at a third of it, as a share of a batch has."""
    leaf = logits.clone().requires_grad_()
    loss = in_place_cross_entropy(leaf * 1, targets)
    (loss / 3).backward()
    return loss.detach(), leaf.grad


def expected(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.float().requires_grad_()
    loss = F.cross_entropy(leaf, targets, ignore_index=IGNORED, reduction="sum")
    (loss / 3).backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_loss_and_gradient_are_those_of_pytorch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_AT_ONCE", rows * V)
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(10, V), torch.randint(V, (10,))
    targets[[0, 4]] = IGNORED
    for own, theirs in zip(computed(logits, targets), expected(logits, targets), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-6, atol=1e-6)


def test_in_bfloat16_only_the_gradient_is_rounded() -> None:
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(10, V)).bfloat16(), torch.randint(V, (10,))
    (loss, gradient), (right, exact) = computed(logits, targets), expected(logits, targets)
    torch.testing.assert_close(loss, right, rtol=1e-6, atol=1e-6)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), exact, rtol=2**-7, atol=1e-6)


def test_a_target_whose_probability_is_zero_in_float32_has_a_finite_loss() -> None:
    logits, targets = torch.zeros(1, V), torch.tensor([5])
    logits[0, 7] = 300.0
    loss, gradient = computed(logits, targets)
    assert loss == 300.0
    assert gradient[0, [5, 7]].tolist() == pytest.approx([-1 / 3, 1 / 3])


def test_nothing_scored_is_a_loss_of_zero() -> None:
    for logits in (torch.randn(3, V), torch.randn(0, V)):
        loss, gradient = computed(logits, torch.full((len(logits),), IGNORED))
        assert loss == 0
        assert not gradient.any()


def test_training_takes_it_and_measuring_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(model, "in_place_cross_entropy", lambda x, _: taken.append(1) or x.sum())
    ids = torch.randint(V, (1, 8))
    config = PRESETS["nano"].model(vocab_size=V)
    with torch.no_grad():
        GPT(config).loss(ids, ids)
    GPT(config, z_loss=1e-4).loss(ids, ids)
    assert not taken
    GPT(config).loss(ids, ids)
    assert taken
    assert not in_place_pays(torch.zeros(2, V))
