"""`TrainConfig`: every setting of a training run from scratch; the defaults of both stand here and in `settings`.

What a preset decides (shape, batch, learning rate, length) is None here unless it is set. It can be loaded from TOML.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

from gptedge.train.presets import PRESETS, Preset
from gptedge.train.settings import Bounds, LoopConfig, check_choice


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """None is what the preset says."""

    VERB: ClassVar[str] = "train"
    bounds: ClassVar[Bounds] = LoopConfig.bounds | {
        "vocab_size": (int, 257, 1 << 20),
        "context_length": (int, 2, 1 << 20),
        "n_layer": (int, 1, 1000),
        "n_head": (int, 1, 1000),
        "n_kv_head": (int, 1, 1000),
        "n_embd": (int, 2, 1 << 16),
        "n_ff": (int, 1, 1 << 20),
        "dropout": (float, 0.0, 0.9),
        "z_loss": (float, 0.0, 1.0),
        "validation_fraction": (float, 0.0, 0.5),
        "eval_windows": (int, 1, 1 << 20),
    }

    preset: str = "nano"
    """A row of `presets.PRESETS`."""
    vocab_size: int | None = None
    """Tokens to learn from the text, at least 257: the bytes and the end-of-text token. Less text may give fewer."""
    context_length: int | None = None
    """Tokens that the model can see, and that each row of a batch has."""
    n_layer: int | None = None
    """Blocks of attention and feed-forward."""
    n_head: int | None = None
    """Heads of queries."""
    n_kv_head: int | None = None
    """Heads of keys and values, of which n_head is a multiple."""
    n_embd: int | None = None
    """Width of the model, a multiple of n_head; heads are n_embd / n_head wide."""
    n_ff: int | None = None
    """Width of the feed-forward's hidden layer."""
    dropout: float = 0.0
    """Chance of each number that is added to the residual stream to be left out (arXiv:1207.0580)."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's sum in the training loss, which keeps logits small (arXiv:2204.02311);
    1e-4 is usual."""
    validation_fraction: float = 0.05
    """Of the text, held out to measure the loss on."""
    eval_windows: int = 32
    """Windows it is measured on, always the same."""

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, PRESETS)
        LoopConfig.__post_init__(self)
        recipe = self.recipe
        recipe.model(vocab_size=recipe.vocab_size)  # refuses shapes that do not fit together

    @property
    def recipe(self) -> Preset:
        """The preset, with what is set here in its place."""
        chosen = {f.name: getattr(self, f.name, None) for f in fields(Preset)}
        return replace(PRESETS[self.preset], **{k: v for k, v in chosen.items() if v is not None})

    @property
    def peak_learning_rate(self) -> float:
        return self.recipe.learning_rate

    @property
    def step_limit(self) -> int | None:
        """The preset's when there is no bound on time either."""
        return self.max_steps if self.max_seconds is not None else self.recipe.max_steps
