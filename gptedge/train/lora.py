"""Low-rank adaptation (LoRA, arXiv:2106.09685): frozen weights, and beside each a trained product of two thin matrices.

    y = W x + (alpha / rank) B A x        A [rank, in] begins random, B [out, rank] with zeros: at first nothing changes

The update is applied to activations, so that no gradient of a whole W is ever made. Where weights are rounded as they
are trained, it is added to the weight before rounding instead, which costs that gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gptedge.errors import UsageError
from gptedge.lora_files import LowRankUpdate
from gptedge.safetensors import FloatArray
from gptedge.train.model import GPT

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""Linear layers of a block that can be adapted; families without a gate have no `gate`."""


class LowRank(nn.Module):
    def __init__(self, n_out: int, n_in: int, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, n_in))
        self.b = nn.Parameter(torch.zeros(n_out, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as the paper's authors' code does

    def forward(self, weight: Tensor) -> Tensor:
        """The weight [out, in] with the update."""
        return torch.addmm(weight, self.b, self.a, alpha=self.scale)

    def of(self, x: Tensor) -> Tensor:
        """What the update adds to the product with x [..., in]."""
        return F.linear(F.linear(x, self.a) * self.scale, self.b)


def add_lora(
    model: GPT, *, rank: int, alpha: float, targets: Sequence[str] | None = None, through_weights: bool = False
) -> None:
    """Freeze the model, and put updates beside the `targets` of every block; None is all of TARGETS that it has.

    `through_weights` adds them to the weights themselves, for what comes after them there. Raises UsageError for a
    target that the model lacks.
    """
    if targets is None:
        targets = TARGETS
    else:
        _check_targets(model, targets)
    model.requires_grad_(False)
    for _, layer in adapted(model, targets):
        update = LowRank(*layer.weight.shape, rank=rank, alpha=alpha)
        if through_weights:
            parametrize.register_parametrization(layer, "weight", update)
        else:
            layer.add_module("lora", update)
            layer.register_forward_hook(_add_update)


def updates(model: GPT) -> dict[str, LowRankUpdate]:
    """The updates that `add_lora` put there, as they are now, by the names of their layers."""
    found = {}
    for name, layer in adapted(model, TARGETS):
        update = _update_of(layer)
        if update is not None:
            found[name] = LowRankUpdate(_array(update.a), _array(update.b), update.scale)
    return found


@torch.no_grad()
def merged_weights(model: GPT) -> dict[str, Tensor]:
    """Every weight by the name that it has in a model without updates, these added."""
    weights = {name: p.detach() for name, p in model.named_parameters() if not _is_part(name)}
    for name, layer in adapted(model, TARGETS):
        update = getattr(layer, "lora", None)
        if update is not None or parametrize.is_parametrized(layer, "weight"):
            weights[f"{name}.weight"] = layer.weight if update is None else update(layer.weight)
    return weights


def adapted(model: GPT, targets: Iterable[str]) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that `targets` means, with their names."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith("blocks.") and name.rpartition(".")[2] in targets:
            yield name, layer


def _check_targets(model: GPT, targets: Sequence[str]) -> None:
    there = [t for t in TARGETS if any(adapted(model, [t]))]
    unknown = [t for t in targets if t not in there]
    if unknown or not targets:
        named = f"{unknown[0]!r} is not a layer of this model" if unknown else "no layer is named"
        raise UsageError(f"lora targets: {named}; choose from {', '.join(there)}")


def _add_update(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    assert isinstance(layer.lora, LowRank)
    return output + layer.lora.of(inputs[0])


def _update_of(layer: Any) -> LowRank | None:
    if parametrize.is_parametrized(layer, "weight"):
        return next((step for step in layer.parametrizations.weight if isinstance(step, LowRank)), None)
    return getattr(layer, "lora", None)


def _array(tensor: Tensor) -> FloatArray:
    return tensor.detach().float().cpu().numpy()


def _is_part(name: str) -> bool:
    """A parameter of an update, or of a weight that is made of several."""
    return ".lora." in name or ".parametrizations." in name
