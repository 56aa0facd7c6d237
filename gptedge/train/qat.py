"""Quantization-aware training: a GPT that computes with rounded weights, and learns with them in mind.

    fake_quantize(model, "int4")        # from here on, forward passes see what a quantized bundle will hold
    with parametrize.cached():          # (torch.nn.utils) rounds a weight once a step, not once a use
        loss = model.loss(ids, targets)
    loss.backward()                     # reaches the float weights as if nothing had been rounded
    weights = rounded_weights(model)    # plain float32 tensors by the model's own names: write these as the checkpoint

What is written lies on the grid of its blocks. Exported as fp32 and quantized with the recipe that QAT_RECIPES names,
it becomes the very integers and scales that were trained: `rounding` finds such a grid and leaves it alone. Not
in fp16, which has too few digits, nor with recipes that smooth or calibrate: those move the weights again.

Rounding is `quantize`'s: blocks, scales and zero points come from the same search. They are found when a model
is wrapped and stay, unless `refresh` looks for them again, which pays after weights have moved by many steps of the
grid. Gradients go straight through (Bengio et al. 2013, arXiv:1308.3432), also where a weight lies outside its block's
range. Each weight is one of `torch.nn.utils.parametrize`'s parametrizations, so that others put there before, such as a
low-rank update, are rounded with it, and the float weights, scales and zero points are all in `model.state_dict()`.
Activations are not rounded here; the kernels do that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gptedge.errors import UsageError
from gptedge.quantize.recipes import RECIPES, Scheme
from gptedge.quantize.rounding import FloatArray, search_scales
from gptedge.train.model import GPT, Block
from gptedge.train.settings import QAT_RECIPES

_SEARCH_EVERY = 20  # steps, in the end; a search takes as long as two steps


def fake_quantize(model: GPT, name: str) -> None:
    """Round the weights that the recipe covers, in every forward pass from now on.

    `name` is one of QAT_RECIPES. Raises UsageError for another, or when the model is wrapped already.
    """
    if name not in QAT_RECIPES:
        raise UsageError(f"quantization-aware training for {name!r} is not known; known are {', '.join(QAT_RECIPES)}")
    if any(_roundings(model)):
        raise UsageError("the model's weights are rounded in training already; fake_quantize takes it once")
    recipe, importance = RECIPES[QAT_RECIPES[name]], _importance(model)
    for path, module in list(_matrices(model)):
        group = recipe.group_of(f"{path}.weight")
        if group is not None:
            scale, zero = _search(module.weight, group.scheme, importance.get(path))
            parametrize.register_parametrization(module, "weight", Rounding(group.scheme, scale, zero))


def refresh(model: GPT) -> None:
    """Look for scales and zero points again, for the weights as they are now."""
    importance = _importance(model)
    for path, module, rounding in _roundings(model):
        scale, zero = _search(_before_rounding(module), rounding.scheme, importance.get(path))
        rounding.scale.copy_(scale)
        rounding.zero.copy_(zero)


def refresh_is_due(step: int) -> bool:
    """Whether to `refresh` after a step of training from scratch: after each of the first seven, then ever more rarely.

    At first weights leave the range that they began in within a few steps, and what lies outside is cut off: with a
    search every 20 steps from the beginning, a tiny model's held-out loss rose from 3.2 to 7.4.
    """
    return step % min(_SEARCH_EVERY, 1 + step // 8) == 0


@torch.no_grad()
def rounded_weights(model: GPT) -> dict[str, Tensor]:
    """Every parameter by the name that it has in a model that is not wrapped, matrices rounded."""
    rounded = {path: module.weight.detach() for path, module, _ in _roundings(model)}
    plain = {name: p.detach() for name, p in model.named_parameters() if ".parametrizations." not in name}
    return {**plain, **{f"{path}.weight": weight for path, weight in rounded.items()}}


class RoundedLoss(nn.Module):
    """The loss of a wrapped model, to train; a weight is rounded once for it, however often it is used."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def loss(self, ids: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        with parametrize.cached():
            return self.model.loss(ids, targets, segments)


class Rounding(nn.Module):
    """Maps a weight [N, K] to what its blocks of integers stand for; scales and zero points are [N, blocks]."""

    scale: Tensor
    zero: Tensor

    def __init__(self, scheme: Scheme, scale: Tensor, zero: Tensor) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def forward(self, weight: Tensor) -> Tensor:
        return _straight(weight, self.scale, self.zero, self.scheme)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
        (n, k), size = weight.shape, scheme.block_size
        blocks = F.pad(weight, (0, -k % size)).view(n, -1, size)
        scale, zero = scale[..., None], zero[..., None]
        steps = torch.div(blocks, scale).round_().add_(zero).clamp_(0, 2**scheme.bits - 1)
        return steps.sub_(zero).mul_(scale).view(n, -1)[:, :k]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None


_straight: Callable[..., Tensor] = _Straight.apply  # which torch leaves untyped


def _matrices(model: GPT) -> Iterator[tuple[str, Any]]:
    """The modules whose weights quantizing takes, by name: linear layers and the table of tokens, but not positions."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or path == "embed":
            yield path, module


def _roundings(model: GPT) -> Iterator[tuple[str, Any, Rounding]]:
    for path, module in _matrices(model):
        if parametrize.is_parametrized(module, "weight"):
            last = module.parametrizations.weight[-1]
            if isinstance(last, Rounding):
                yield path, module, last


@torch.no_grad()
def _before_rounding(module: Any) -> Tensor:
    weights = module.parametrizations.weight
    value: Tensor = weights.original
    for step in list(weights)[:-1]:
        value = step(value)
    return value


def _search(weight: Tensor, scheme: Scheme, importance: FloatArray | None) -> tuple[Tensor, Tensor]:
    values = weight.detach().float().cpu().numpy()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = search_scales(values, scheme, importance, pool)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _importance(model: GPT) -> dict[str, FloatArray]:
    """How much each column's error counts: the squared gain of the norm before a product, where there is one."""
    found: dict[str, FloatArray] = {}
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for norm, paths in (
            (block.attn_norm, ("attn.q", "attn.k", "attn.v")),
            (block.mlp_norm, ("mlp.gate", "mlp.up")),
        ):
            if isinstance(norm, nn.RMSNorm):
                gain = np.square(norm.weight.detach().float().cpu().numpy())
                found |= {f"blocks.{i}.{path}": gain for path in paths}
    return found
