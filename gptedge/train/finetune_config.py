"""`FinetuneConfig`: every setting of a fine-tuning run; the defaults of both stand here and in `settings`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gptedge.errors import UsageError
from gptedge.train.settings import Bounds, LoopConfig, check_switch

_LEARNING_RATE_LORA, _LEARNING_RATE_FULL = 1e-3, 1e-4


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig):
    """Learning rates of None are 1e-3 for LoRA's updates, and 1e-4 where every weight is trained."""

    VERB: ClassVar[str] = "finetune"
    bounds: ClassVar[Bounds] = LoopConfig.bounds | {
        "epochs": (float, 0.001, 1e6),
        "context_length": (int, 8, 1 << 20),
        "lora_rank": (int, 0, 4096),
        "lora_alpha": (float, 1e-3, 1e6),
        "validation_fraction": (float, 0.0, 0.5),
    }
    unset: ClassVar[dict[str, str]] = LoopConfig.unset | {
        "max_steps": "by epochs",
        "learning_rate": f"{_LEARNING_RATE_LORA:g}; {_LEARNING_RATE_FULL:g} at rank 0",
        "lora_targets": "all",
    }

    max_steps: int | None = None
    """Weight updates to make, whatever the epochs."""
    max_seconds: float | None = None
    """Time to train for, whatever the epochs. With both, the learning rate follows whichever comes first."""
    epochs: float = 3.0
    """How often each example is seen, unless there is a bound on steps or time."""
    batch_size: int | None = 16
    """Conversations in each step."""
    context_length: int = 1024
    """Tokens of a conversation that are read, or the model's own context where that is shorter."""
    lora_rank: int = 8
    """Of each update (arXiv:2106.09685); 0 trains every weight instead."""
    lora_alpha: float = 16.0
    """Updates are multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] | None = None
    """Layers of each block that get one, of q, k, v, o, gate, up, down; None is all that there are."""
    adapter: bool = False
    """Write the updates alone, in PEFT's format, rather than the whole model."""
    validation_fraction: float = 0.0
    """Of the examples, held out to measure the loss on, and not learned."""
    embedding_scale: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)
        check_switch("adapter", self.adapter)
        if self.lora_targets is not None:
            if not isinstance(self.lora_targets, (list, tuple)) or not all(
                isinstance(name, str) for name in self.lora_targets
            ):
                raise UsageError(f'lora_targets is {self.lora_targets!r}; it must be a list such as ["q", "v"]')
            object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        if self.batch_size is None:
            raise UsageError("batch_size is None; it must be a whole number from 1 to 1.04858e+06")
        if self.adapter and not self.lora_rank:
            raise UsageError("an adapter holds LoRA's updates, and lora_rank is 0; leave out --adapter, or set a rank")
        if self.adapter and self.qat:
            raise UsageError(
                f"--qat {self.qat} rounds whole weights, which an adapter does not hold; leave out --adapter"
            )

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or (_LEARNING_RATE_LORA if self.lora_rank else _LEARNING_RATE_FULL)
