"""`LoopConfig`: what the training loop itself is set by, whatever it trains; checked where it is made, read from TOML.

A dataclass that extends it adds fields and their bounds, and with them keys of its TOML file.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from gptedge.errors import UsageError

Precision = Literal["auto", "fp32", "bf16"]
Schedule = Literal["cosine", "trapezoid"]
Bounds = dict[str, tuple[type, float, float]]
"""name -> kind, lowest, highest"""
QAT_RECIPES = {"int4": "int4-rtn", "int8": "int8-weight"}
"""Roundings that can be trained with, and the data-free recipe of `quantize` that each is for."""

# May differ when a run is resumed: they say how far to go, what to report, how to share the work of a step out, and how
# large steps are, which a loss that is not a number asks to change.
RESUMABLE_CHANGES = frozenset({"max_steps", "max_seconds", "patience", "eval_every", "save_every", "keep_states"}) | {
    "threads",
    "grad_accumulation",
    "compile",
    "learning_rate",
    "grad_clip",
}


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Flat and frozen; what None stands for, a subclass says."""

    VERB: ClassVar[str]
    """The command that takes it."""
    bounds: ClassVar[Bounds] = {
        "max_steps": (int, 1, 10**9),
        "max_seconds": (float, 0.01, 10**9),
        "seed": (int, 0, 2**63 - 1),
        "batch_size": (int, 1, 1 << 20),
        "learning_rate": (float, 1e-9, 1.0),
        "embedding_scale": (float, 1e-3, 1e3),
        "warmup": (float, 0.0, 0.9),
        "final_learning_rate": (float, 0.0, 1.0),
        "weight_decay": (float, 0.0, 10.0),
        "beta1": (float, 0.0, 0.99999),
        "beta2": (float, 0.0, 0.99999),
        "grad_clip": (float, 1e-6, 1e6),
        "grad_accumulation": (int, 1, 1 << 20),
        "decay": (float, 0.01, 1.0),
        "patience": (int, 0, 10**6),
        "threads": (int, 0, 4096),
        "eval_every": (int, 1, 10**9),
        "save_every": (int, 0, 10**9),
        "keep_states": (int, 1, 1000),
    }
    unset: ClassVar[dict[str, str]] = {"max_seconds": "none", "qat": "none"}
    """What None stands for, for people."""

    max_steps: int | None = None
    """Weight updates to make. With no bound on time either, the preset's."""
    max_seconds: float | None = None
    """Time to train for. With both, the learning rate follows, and training ends with, whichever comes first."""
    seed: int = 0
    """Of the first weights and of the order of the data."""
    batch_size: int | None = None
    """Rows in each step, of all processes together."""
    learning_rate: float | None = None
    """The highest of the schedule."""
    embedding_scale: float = 5.0
    """Times it, for embedding tables: most of their rows see a gradient in few steps."""
    warmup: float = 0.05
    """Fraction of the run in which the learning rate rises."""
    final_learning_rate: float = 0.05
    """Fraction of `learning_rate` at which the run ends."""
    schedule: Schedule = "cosine"
    """How it falls after the warmup: along half a cosine, or as a trapezoid: not at all until the last `decay`."""
    decay: float = 0.2
    """Fraction of the run, its end, in which a trapezoid's learning rate falls."""
    weight_decay: float = 0.1
    """Of matrices; embeddings, norms and biases do not decay."""
    beta1: float = 0.9
    """AdamW's memory of gradients (arXiv:1711.05101)."""
    beta2: float = 0.99
    """AdamW's memory of their squares."""
    grad_clip: float = 1.0
    """Largest norm of all gradients together; larger ones are scaled down."""
    grad_accumulation: int = 1
    """Parts in which a step's batch is computed, one after another: less memory, the same result."""
    precision: Precision = "auto"
    """bf16 runs matrix products in bfloat16; auto does where that is measured to be faster (or a GPU has it)."""
    compile: bool = False
    """Compile the model with torch.compile: minutes before the first step, and faster ones on a GPU.

    On a processor it needs a C++ compiler."""
    qat: str | None = None
    """int4 or int8: train with weights rounded as quantizing will round them; one process, no sharding."""
    threads: int = 0
    """Processor threads; 0 leaves it to torch."""
    eval_every: int = 100
    """Steps between measurements of the validation loss; it is also measured at the end."""
    save_every: int = 500
    """Steps between saves of the state that --resume continues from; 0 saves only at the end and on Ctrl+C."""
    keep_states: int = 2
    """Latest states kept, besides the best; with two, a damaged one costs `save_every` steps."""
    patience: int = 0
    """End after so many measurements of the validation loss without a new lowest, and write the weights of the lowest.

    0 goes on to the end, and writes the last.
    """

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("auto", "fp32", "bf16"))
        check_choice("schedule", self.schedule, ("cosine", "trapezoid"))
        check_switch("compile", self.compile)
        if self.qat is not None:
            check_choice("qat", self.qat, QAT_RECIPES)
        for name, (kind, low, high) in self.bounds.items():
            object.__setattr__(self, name, _checked_number(name, getattr(self, name), kind, low, high))

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        return asdict(self)

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or what stands for it where it is None."""
        assert self.learning_rate is not None, "a subclass that leaves it None says what stands for it"
        return self.learning_rate

    @property
    def step_limit(self) -> int | None:
        """The number of steps; None leaves it to the time."""
        return self.max_steps

    @classmethod
    def from_toml(
        cls,
        path: Path,
        overrides: Mapping[str, Any] | None = None,
        *,
        defaults: Mapping[str, Any] | None = None,
    ) -> Self:
        """`defaults`, over them settings of a TOML file, over these those of `overrides` that are not None.

        Raises UsageError.
        """
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UsageError(f"config file {path} cannot be read: {e}") from None
        given = {k: v for k, v in (overrides or {}).items() if v is not None}
        return cls.from_dict({**(defaults or {}), **table, **given}, where=str(path))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], *, where: str) -> Self:
        """Settings by name; `where` they come from goes into the message about an unknown one."""
        known = [f.name for f in fields(cls)]
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "--list-settings shows those that there are"
                raise UsageError(f"{where}: {key!r} is not a setting; {hint}")
        return cls(**settings)


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise UsageError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


def check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}; it must be true or false")


def _checked_number(name: str, value: Any, kind: type, low: float, high: float) -> Any:
    """`value` as its kind: an integer is a number too, which becomes a float where one is meant; a bool is none.

    None passes.
    """
    if value is None:
        return None
    noun = "a whole number" if kind is int else "a number"
    wanted = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}; it must be {noun} from {low:g} to {high:g}")
    return kind(value)
