"""Parts of a training loop that keep nothing between steps: objective, optimizer, memory, weights."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptedge.errors import UsageError
from gptedge.train.batches import Batch
from gptedge.train.processes import like
from gptedge.train.settings import LoopConfig


def set_up_torch(config: LoopConfig) -> None:
    """Threads, and whether what `config` asks for can be had here. Raises UsageError."""
    if config.threads:
        torch.set_num_threads(config.threads)
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if config.compile and not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise UsageError(
            f"compile is true, and there is no C++ compiler {compiler}; install one, or set compile = false"
        )


class Objective(nn.Module):
    """A model's loss as a module's call, which is what PyTorch's own wrappers take."""

    def __init__(self, model: nn.Module) -> None:
        """`model` has `loss(ids, targets, segments)`: the mean over the scored targets, 0 where none is."""
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        loss: Tensor = self.model.loss(ids, targets, segments)  # type: ignore[operator]  # nn.Module knows no methods
        return loss


def parameter_groups(model: nn.Module, config: LoopConfig) -> list[dict[str, Any]]:
    """Of what requires a gradient, matrices decay, and all that has one dimension (norms, biases) does not.

    Neither do embedding tables, which learn faster. `scale` times the schedule's learning rate is a group's own.
    """
    tables = [p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters() if p.requires_grad]
    others = [p for p in model.parameters() if p.requires_grad and all(p is not table for table in tables)]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay, "scale": 1.0},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0, "scale": 1.0},
        {"params": tables, "weight_decay": 0.0, "scale": config.embedding_scale},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW, fused: 2.4 ms a step for 4M parameters where the plain loop takes 8.3."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks rather than give them back to the kernel, which clears each page anew.

    A step of a 2.4M-parameter model took 279 ms before and 183 ms after. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option, size in _MALLOC_OPTIONS:
        mallopt(option, size)


# M_MMAP_THRESHOLD at the largest that glibc takes, M_TRIM_THRESHOLD, M_TOP_PAD: numbers of malloc.h, sizes in bytes
_MALLOC_OPTIONS = ((-3, 32 << 20), (-1, 2**31 - 1), (-2, 64 << 20))


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy in nats over the scored tokens of all batches."""
    model.eval()
    objective = Objective(model)
    total = sum(float(objective(b.ids, b.targets, b.segments)) * b.scored for b in batches)
    model.train()
    return total / sum(b.scored for b in batches)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that require a gradient, and the buffers that a state_dict has."""
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in fixed}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `trained_state` gave. Raises KeyError for anything else."""
    if difference := trained_state(model).keys() ^ state.keys():
        raise KeyError(f"{min(difference)} is in only one of model and state")
    own = model.state_dict()
    model.load_state_dict({name: like(own[name], tensor) for name, tensor in state.items()}, strict=False)
