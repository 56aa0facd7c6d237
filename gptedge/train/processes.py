"""One run in one process or in several that torchrun started: who this process is, and how the work is shared out.

Gradients travel by PyTorch's own DDP, or by FSDP2, where each process keeps a part of weights and optimizer; over gloo
between processors and NCCL between GPUs. A state is written whole, so that any number of processes goes on with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from gptedge.errors import GptEdgeError, UsageError
from gptedge.text import counted
from gptedge.train.batches import Batch

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # the others wait while the first process tokenizes
_groups: list[Any] = []
"""Kept until the process ends. Gloo's destructor waits for its threads with the interpreter's lock held, and they may
want that lock to free the tensors of the last message: both would wait for ever."""


def choose_device(local_rank: int = 0) -> torch.device:
    """This process's GPU, or the processor where there is none: the one place that decides."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shard: bool = False
    """FSDP2 instead of DDP."""

    @property
    def leads(self) -> bool:
        """The one that writes and speaks."""
        return self.rank == 0

    def describe(self) -> str:
        threads = counted(torch.get_num_threads(), "thread")
        where = threads if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        how = "FSDP2" if self.shard else "DDP"
        return where if self.world == 1 else f"{self.world} processes ({how}), {where} each"

    def gather(self, value: float) -> list[float]:
        """Every process's value, by rank."""
        if self.world == 1:
            return [value]
        mine = torch.tensor([value], dtype=torch.float64, device=self.device)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine)
        return [float(t) for t in found]

    def from_leader(self, make: Callable[[], T]) -> T:
        """What `make` gives in the leader, in every process; where it raises a GptEdgeError, that.

        The others wait meanwhile.
        """
        if self.world == 1:
            return make()
        made: list[T | GptEdgeError | None] = [None]
        if self.leads:
            try:
                made = [make()]
            except GptEdgeError as e:
                made = [e]
        dist.broadcast_object_list(made)
        value = made[0]
        if isinstance(value, GptEdgeError):
            value.is_reported = not self.leads
            raise value
        return cast(T, value)

    def parts(self, batch: Batch, count: int) -> list[tuple[Batch, float]]:
        """This process's rows in `count` parts, and each part's share of all the batch's scored targets.

        No more parts than rows fill. One without rows, as some of several processes may have, is one row that counts
        for nothing, so that every process does the same number of passes.
        """
        count = min(count, -(-len(batch.ids) // self.world))
        total, scored = self.world * count, max(1, batch.scored)
        bounds = [len(batch.ids) * i // total for i in range(total + 1)]
        mine = range(self.rank * count, (self.rank + 1) * count)
        found = [
            (batch.rows(bounds[i], bounds[i + 1]), True) if bounds[i] < bounds[i + 1] else (batch.rows(0, 1), False)
            for i in mine
        ]
        return [(part.to(self.device), part.scored / scored if counts else 0.0) for part, counts in found]

    def prepare(self, model: nn.Module) -> None:
        """Put the model where it is trained, and shard it: before the optimizer sees its parameters."""
        model.to(self.device)
        if self.shard:
            for blocks in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
                for layer in blocks:
                    fully_shard(layer)
            fully_shard(model)
            register_fsdp_forward_method(model, "loss")

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The objective, its gradients averaged over the processes."""
        return DistributedDataParallel(objective) if self.world > 1 and not self.shard else objective


@contextmanager
def processes(*, shard: bool = False) -> Iterator[Processes]:
    """The processes that torchrun started, joined; or this one alone."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = choose_device(local)
    if world == 1:
        if shard:
            raise UsageError("--shard needs several processes; start it with torchrun --nproc-per-node N -m gptedge …")
        yield Processes(device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    _groups.append(dist.group.WORLD)
    try:
        yield Processes(dist.get_rank(), world, device, shard)
    finally:
        dist.destroy_process_group()


def whole(tree: Any) -> Any:
    """Nested tensors, each whole and on the processor; every process has to ask, since shards are gathered."""
    return tree_map(lambda x: _whole(x) if isinstance(x, Tensor) else x, tree)


def _whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, sharded as the parameter is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def optimizer_state_like(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A whole optimizer state, its tensors sharded as the parameters are."""
    parameters: Sequence[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        i: {k: like(parameters[i], v) if isinstance(v, Tensor) else v for k, v in values.items()}
        for i, values in state["state"].items()
    }
    return state | {"state": moments}
