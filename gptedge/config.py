"""The two settings objects that everything shares: `ModelConfig` (what a GPT is) and `SamplingParams` (how to sample).

Both are flat, frozen and checked where they are made. Reading other projects' configuration files is `families`' job.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gptedge.errors import UsageError

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
Position = Literal["rope", "learned"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings, of the kinds that do not depend on the input's length."""

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    """What slowed frequencies are divided by."""
    low_freq_factor: float = 1.0
    """llama3 only: wavelengths above `original_context_length / low_freq_factor` are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3 only: wavelengths below `original_context_length / high_freq_factor` are left alone."""
    original_context_length: int = 8192
    beta_fast: float = 32.0
    """yarn only: dimensions that turn more often than this within the original context are left alone."""
    beta_slow: float = 1.0
    """yarn only: dimensions that turn less often than this are divided by `factor`; those between are blended."""
    truncate: bool = True
    """yarn only: the blended range begins and ends at whole dimensions."""
    divisors: tuple[float, ...] = ()
    """longrope only: what each frequency is divided by. Its other divisors, for texts beyond the original context, are
    not there: a cache cannot follow the change, so the context ends at it."""
    attention_factor: float = 1.0
    """Factor of the rotated queries and keys alike (yarn, longrope)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Defaults are Llama's shape; the other values of the switches are other families'."""

    n_layer: int
    n_head: int
    n_kv_head: int
    """Heads of keys and values; each serves n_head / n_kv_head query heads (arXiv:2305.13245)."""
    n_embd: int
    head_dim: int
    n_ff: int
    """Width of the feed-forward layer."""
    vocab_size: int
    context_length: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    """Leading dimensions of each head that rotate; None is all of them."""
    tie_embeddings: bool = True
    """The output projection is the embedding table."""
    norm: Norm = "rms"
    activation: Activation = "silu"
    gated: bool = True
    """Feed-forward is down(act(gate(x)) * up(x)) rather than down(act(up(x)))."""
    position: Position = "rope"
    qkv_bias: bool = False
    out_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k, before rotation (Qwen3)."""
    qk_norm_joint: bool = False
    """That norm is over all the heads of q, and all of k, together (OLMo 2)."""
    pre_norm: bool = True
    """Attention and feed-forward read the norm of the residual stream, rather than the stream itself."""
    post_norm: bool = False
    """What attention and feed-forward write is normalised before it is added (OLMo 2; Gemma beside pre_norm)."""
    parallel: bool = False
    """Attention and feed-forward read the same residual stream, and are added together (GPT-NeoX)."""
    windows: tuple[int, ...] = ()
    """For each layer, how many tokens a query sees, itself the last of them; 0 is all. Empty: all, in every layer."""
    local_rope_theta: float | None = None
    """Base of the unscaled rotary embeddings of those layers that have a window; None: theirs are like the others'."""
    rope_reversed: bool = False
    """Heads rotate the other way round (nanochat)."""
    attn_scale: float | None = None
    """Factor of the attention scores; None is 1 / sqrt(head_dim)."""
    attn_softcap: float | None = None
    """Attention scores become cap * tanh(scores / cap) (Gemma 2)."""
    embed_scale: float = 1.0
    """Factor of the embeddings on their way in."""
    embed_norm: bool = False
    """The embeddings are normalised before the first layer (nanochat)."""
    logit_softcap: float | None = None
    """Logits become cap * tanh(logits / cap)."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_ff", "vocab_size", "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"model config: {name} is {value!r}; it must be a positive integer")
        for name in ("norm_eps", "rope_theta", "embed_scale"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise UsageError(f"model config: {name} is {value!r}; it must be a positive number")
        if self.n_head % self.n_kv_head:
            raise UsageError(f"model config: n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim % 2 and self.position == "rope":
            raise UsageError(f"model config: head_dim {self.head_dim} is odd; rotary embeddings need an even number")
        if self.position == "rope" and (self.rope_dim % 2 or not 0 < self.rope_dim <= self.head_dim):
            raise UsageError(
                f"model config: rotary_dim is {self.rotary_dim}; it must be even and at most head_dim {self.head_dim}"
            )
        if self.windows and (len(self.windows) != self.n_layer or min(self.windows) < 0):
            raise UsageError(
                f"model config: windows is {self.windows}; it must hold a size for each of the {self.n_layer} layers"
            )
        scaling = self.rope_scaling
        if scaling and scaling.kind == "longrope" and len(scaling.divisors) != self.rope_dim // 2:
            raise UsageError(
                f"model config: longrope has {len(scaling.divisors)} divisors; "
                f"it must have one for each of the {self.rope_dim // 2} frequencies"
            )

    @property
    def q_size(self) -> int:
        return self.n_head * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def rope_dim(self) -> int:
        return self.rotary_dim or self.head_dim

    def window(self, i: int) -> int:
        """How many tokens a query of layer i sees; 0 is all."""
        return self.windows[i] if self.windows else 0

    def rope_of(self, i: int) -> ModelConfig:
        """The configuration whose rotary embeddings are layer i's."""
        if self.local_rope_theta is None or not self.window(i):
            return self
        return replace(self, rope_theta=self.local_rope_theta, rope_scaling=None, local_rope_theta=None)

    @property
    def rope_attention_factor(self) -> float:
        """Factor of cosines and sines."""
        return self.rope_scaling.attention_factor if self.rope_scaling else 1.0

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a float32 KV cache for one token of one sequence."""
        return 2 * self.n_layer * self.kv_size * 4


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, and when to stop. The only place where these defaults stand."""

    max_tokens: int = 256
    """Most tokens to generate; generation also ends where the context does."""
    temperature: float = 0.0
    """0 is greedy decoding; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities reach p (nucleus sampling, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Above 1, logits of tokens already seen are divided (when positive) or multiplied by it (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it was generated."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Token id -> amount added to its logit."""
    seed: int | None = None
    """Same seed, same text; None draws a fresh one."""
    stop: tuple[str, ...] = ()
    """Generation ends before any of these strings appears; it is not part of the text."""
    logprobs: int | None = None
    """None: no log-probabilities. N: those of each chosen token and of the N likeliest alternatives."""
    schema: Mapping[str, Any] | bool | None = None
    """The reply is a JSON text of a value that this JSON Schema allows, as far as `max_tokens` lets it come to its end;
    see gptedge.grammar.json_schema for what is supported. None: any text."""
    context_overflow: str = "error"
    """When the context is full: `error` refuses a prompt, and ends a reply as `length`; `shift` leaves out the oldest
    turns of a chat, its system message aside, or the oldest tokens of a plain text, and says how many."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif not isinstance(self.stop, Iterable):
            raise UsageError(f"stop is {self.stop!r}; it must be strings")
        object.__setattr__(self, "stop", tuple(self.stop))
        for name, low, high in _SAMPLING_BOUNDS:
            value = getattr(self, name)
            if value is not None or name not in ("seed", "logprobs"):
                _check_number(name, value, low, high, whole=name in _WHOLE)
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise UsageError("stop has an empty string or something that is not a string; leave it out")
        if self.context_overflow not in CONTEXT_OVERFLOW:
            known = " or ".join(CONTEXT_OVERFLOW)
            raise UsageError(f"context_overflow is {self.context_overflow!r}; it must be {known}")
        if self.schema is not None and not isinstance(self.schema, (Mapping, bool)):
            raise UsageError(f"schema is {repr(self.schema)[:60]}; it must be a JSON Schema: an object, true or false")
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            _check_number("a token of logit_bias", token, 0, 2**31 - 1, whole=True)
            _check_number(f"logit_bias of token {token}", bias, -1e6, 1e6)


def _check_number(name: str, value: object, low: float, high: float, *, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise UsageError(f"{name} is {value!r}; it must be {kind} from {low:g} to {high:g}")


CONTEXT_OVERFLOW = ("error", "shift")
_WHOLE = ("max_tokens", "top_k", "seed", "logprobs")
_SAMPLING_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 0, 2**31 - 1),
    ("temperature", 0.0, 100.0),
    ("top_k", 0, 2**31 - 1),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("frequency_penalty", -100.0, 100.0),
    ("seed", 0, 2**63 - 1),
    ("logprobs", 0, 1000),
)


def rope_frequencies(config: ModelConfig) -> list[float]:
    """Angular frequencies (radians per position) of rotary embeddings (arXiv:2104.09864), `rope_dim / 2` of them."""
    dim = config.rope_dim
    plain = [config.rope_theta ** (-2 * i / dim) for i in range(dim // 2)]
    scaling = config.rope_scaling
    frequencies = _SCALED[scaling.kind](plain, scaling, config) if scaling else plain
    return [-f for f in frequencies] if config.rope_reversed else frequencies


def _linear(plain: list[float], s: RopeScaling, c: ModelConfig) -> list[float]:
    return [f / s.factor for f in plain]


def _llama3(plain: list[float], s: RopeScaling, c: ModelConfig) -> list[float]:
    """Long wavelengths are slowed by `factor`, short ones are kept, those between are blended."""
    turns = [s.original_context_length * f / (2 * math.pi) for f in plain]  # full turns within the original context
    keep = [(t - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor) for t in turns]
    return _blend(plain, keep, s.factor)


def _yarn(plain: list[float], s: RopeScaling, c: ModelConfig) -> list[float]:
    """The blend is linear in the dimension, between two that turn so and so often (arXiv:2309.00071)."""

    def dimension(turns: float) -> float:
        return c.rope_dim * math.log(s.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.rope_dim - 1)
    width = high - low or 0.001
    return _blend(plain, [1 - (i - low) / width for i in range(len(plain))], s.factor)


def _longrope(plain: list[float], s: RopeScaling, c: ModelConfig) -> list[float]:
    """Each frequency has its divisor (arXiv:2402.13753)."""
    return [f / divisor for f, divisor in zip(plain, s.divisors, strict=True)]


def _blend(plain: list[float], keep: list[float], factor: float) -> list[float]:
    """Frequencies between kept, where `keep` is 1 and more, and divided by the factor, where it is 0 and less."""
    kept = [min(1.0, max(0.0, k)) for k in keep]
    return [k * f + (1 - k) * f / factor for f, k in zip(plain, kept, strict=True)]


_SCALED = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
