"""What each family's config.json says, as a `ModelConfig`: a function a family, named in the table of `families`.

An option that would change what is computed and that we do not implement is refused by its name, never ignored. Where a
key is missing, the default is the family's own in Hugging Face's transformers, whose code says what each key means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gptedge.config import Activation, ModelConfig, RopeScaling
from gptedge.errors import CheckpointError, UnsupportedModelError

HfConfig = Mapping[str, Any]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu2": "relu2",
}

# Options that change what is computed -> the values that change nothing. A row that implements one names it `handled`.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_chunk_size": (0,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "sliding_window": (),
    "use_bidirectional_attention": (False,),
    "use_parallel_residual": (False,),
}


def _need(c: HfConfig, key: str) -> Any:
    if c.get(key) is None:
        raise CheckpointError(f"config.json has no {key}, which {c.get('model_type', 'this family')} needs")
    return c[key]


def _activation(c: HfConfig, key: str) -> Activation:
    name = c.get(key, "silu")
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"activation {name!r} is not supported; known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _refuse(c: HfConfig, handled: Sequence[str]) -> None:
    """UnsupportedModelError for an option that would change what is computed, other than those `handled`."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    for key, neutral in _NEUTRAL.items():
        value = c.get(key, rope.get(key))
        if key not in handled and value is not None and value not in neutral and not _idle_window(c, key):
            raise UnsupportedModelError(f"{key} {value!r} is not supported for {c.get('model_type', 'this family')}")


def _idle_window(c: HfConfig, key: str) -> bool:
    """Whether this option is a sliding window that is switched off, or holds the whole context."""
    off = not c.get("use_sliding_window", True)
    return key == "sliding_window" and (off or int(c[key]) >= int(c.get("max_position_embeddings") or 0))


def _rope(c: HfConfig) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_theta` + `rope_scaling` or the newer `rope_parameters` that holds both."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in _ROPE_SCALINGS:
        known = ", ".join(["default", *_ROPE_SCALINGS])
        raise UnsupportedModelError(f"rope scaling {kind!r} is not supported; known are {known}")
    try:
        return theta, _ROPE_SCALINGS[kind](c, rope)
    except (TypeError, ValueError, OverflowError):
        raise CheckpointError(f"config.json: the numbers of rope scaling {kind!r} are not all numbers") from None


def _rope_number(rope: HfConfig, key: str) -> float:
    value = float(rope[key]) if rope.get(key) is not None else 0.0
    if not 0 < value < math.inf:
        raise CheckpointError(f"config.json: rope scaling has {key} {rope.get(key)!r}; it must be a positive number")
    return value


def _original_context(c: HfConfig, rope: HfConfig) -> int:
    """Tokens that the model was first trained on; beside the scaling's own numbers in Phi-3."""
    stated = (c.get("original_max_position_embeddings"), rope.get("original_max_position_embeddings"))
    return int(next((v for v in stated if v), None) or _need(c, "max_position_embeddings"))


def _linear(c: HfConfig, rope: HfConfig) -> RopeScaling:
    return RopeScaling(kind="linear", factor=_rope_number(rope, "factor"))


def _llama3(c: HfConfig, rope: HfConfig) -> RopeScaling:
    return RopeScaling(
        kind="llama3",
        factor=_rope_number(rope, "factor"),
        low_freq_factor=_rope_number(rope, "low_freq_factor"),
        high_freq_factor=_rope_number(rope, "high_freq_factor"),
        original_context_length=int(_rope_number(rope, "original_max_position_embeddings")),
    )


def _extension(c: HfConfig, rope: HfConfig) -> float:
    """By how much the context was lengthened: stated, or the ratio of the two lengths."""
    if rope.get("factor") is not None:
        return _rope_number(rope, "factor")
    return float(_need(c, "max_position_embeddings")) / _original_context(c, rope)


def _yarn(c: HfConfig, rope: HfConfig) -> RopeScaling:
    factor = _extension(c, rope)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    attention = scale(over) / scale(under) if over and under else scale(1.0)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context_length=_original_context(c, rope),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=_attention_factor(rope, attention),
    )


def _longrope(c: HfConfig, rope: HfConfig) -> RopeScaling:
    """With the divisors for short texts; `_context_length` ends the context where the others would begin."""
    original, factor = _original_context(c, rope), _extension(c, rope)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        kind="longrope",
        original_context_length=original,
        divisors=tuple(_rope_number({"short_factor": v}, "short_factor") for v in rope.get("short_factor") or ()),
        attention_factor=_attention_factor(rope, attention),
    )


def _attention_factor(rope: HfConfig, default: float) -> float:
    return default if rope.get("attention_factor") is None else _rope_number(rope, "attention_factor")


# Kinds whose frequencies do not change with the text's length ("dynamic" does). su is longrope's first name.
_ROPE_SCALINGS: dict[str, Callable[[HfConfig, HfConfig], RopeScaling]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}


def _context_length(c: HfConfig, scaling: RopeScaling | None) -> int:
    length = int(_need(c, "max_position_embeddings"))
    return min(length, scaling.original_context_length) if scaling and scaling.kind == "longrope" else length


def _rotary_dim(c: HfConfig, head_dim: int) -> int | None:
    """ModelConfig's rotary_dim."""
    rope = c.get("rope_parameters") or {}
    stated = (rope.get("partial_rotary_factor"), c.get("partial_rotary_factor"), 1.0)
    dim = int(head_dim * float(next(v for v in stated if v is not None)))
    return None if dim == head_dim else dim


_SLIDING, _FULL = "sliding_attention", "full_attention"


def _windows(c: HfConfig, kinds: Sequence[str], *, fixed: bool = False) -> tuple[int, ...]:
    """Each layer's window. `kinds` stands in for missing `layer_types`; when `fixed`, those may not say otherwise."""
    stated = list(c.get("layer_types") or kinds)
    window = c.get("sliding_window")
    known = {_FULL, _SLIDING} if window else {_FULL}
    if (fixed and stated != list(kinds)) or not set(stated) <= known or len(stated) != len(kinds):
        raise UnsupportedModelError(
            f"layer_types {', '.join(dict.fromkeys(stated))} with sliding_window {window} are not supported "
            f"for {c.get('model_type', 'this family')}"
        )
    return tuple(int(window or 0) if kind == _SLIDING else 0 for kind in stated)


def _shared_config(c: HfConfig, *handled: str) -> ModelConfig:
    """What most families share with Llama. `handled` are the caller's options of _NEUTRAL; the others are refused."""
    _refuse(c, handled)
    theta, scaling = _rope(c)
    n_head, n_embd = int(_need(c, "num_attention_heads")), int(_need(c, "hidden_size"))
    head_dim = int(c.get("head_dim") or n_embd // n_head)
    bias = bool(c.get("attention_bias", False))
    return ModelConfig(
        n_layer=int(_need(c, "num_hidden_layers")),
        n_head=n_head,
        n_kv_head=int(c.get("num_key_value_heads") or n_head),
        n_embd=n_embd,
        head_dim=head_dim,
        n_ff=int(_need(c, "intermediate_size")),
        vocab_size=int(_need(c, "vocab_size")),
        context_length=_context_length(c, scaling),
        norm_eps=float(c.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=_rotary_dim(c, head_dim),
        tie_embeddings=bool(c.get("tie_word_embeddings", False)),
        activation=_activation(c, "hidden_act"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(c.get("mlp_bias", False)),
    )


def llama(c: HfConfig) -> ModelConfig:
    config = _shared_config(c, "attention_bias", "mlp_bias")
    _windows({**c, "sliding_window": None}, [_FULL] * config.n_layer)
    return config


def _useful(windows: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Windows that hold the whole context are none."""
    return windows if any(0 < w < config.context_length for w in windows) else ()


def _sliding_config(c: HfConfig, *handled: str) -> ModelConfig:
    """A window in every layer or in none."""
    config = _shared_config(c, "sliding_window", *handled)
    kinds = [_SLIDING if c.get("sliding_window") else _FULL] * config.n_layer
    return replace(config, windows=_useful(_windows(c, kinds, fixed=True), config))


def mistral(c: HfConfig) -> ModelConfig:
    return _sliding_config({"sliding_window": 4096, **c})


def phi3(c: HfConfig) -> ModelConfig:
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "yarn":  # as its first files called longrope
        c = {**c, "rope_parameters": {**rope, "rope_type": "longrope"}}
    defaults = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}
    return _sliding_config({**defaults, **c}, "partial_rotary_factor")


def _qwen_config(c: HfConfig) -> ModelConfig:
    """Qwen 2 and 3: with use_sliding_window, a window from layer max_window_layers on."""
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    config = _shared_config(c, "sliding_window", "attention_bias")
    first = int(c.get("max_window_layers", 28)) if window else config.n_layer
    kinds = [_SLIDING if i >= first else _FULL for i in range(config.n_layer)]
    return replace(config, windows=_useful(_windows({**c, "sliding_window": window}, kinds), config))


def qwen2(c: HfConfig) -> ModelConfig:
    return replace(_qwen_config(c), qkv_bias=True, out_bias=False)


def qwen3(c: HfConfig) -> ModelConfig:
    return replace(_qwen_config(c), qk_norm=True)


def olmo2(c: HfConfig) -> ModelConfig:
    config = _shared_config({"rms_norm_eps": 1e-5, **c}, "attention_bias")
    return replace(config, qk_norm=True, qk_norm_joint=True, pre_norm=False, post_norm=True)


def gpt_neox(c: HfConfig) -> ModelConfig:
    renamed = {
        "rope_theta": c.get("rotary_emb_base"),
        "rms_norm_eps": c.get("layer_norm_eps", 1e-5),
        "partial_rotary_factor": c.get("partial_rotary_factor", c.get("rotary_pct", 0.25)),
    }
    config = _shared_config(
        {"hidden_act": "gelu", "attention_bias": True, **c, **{k: v for k, v in renamed.items() if v is not None}},
        "attention_bias",
        "use_parallel_residual",
        "partial_rotary_factor",
    )
    return replace(
        config,
        n_kv_head=config.n_head,
        norm="layer",
        gated=False,
        mlp_bias=True,
        parallel=bool(c.get("use_parallel_residual", True)),
    )


def gemma(c: HfConfig) -> ModelConfig:
    """Gemma 1. Its `gelu` has always meant the tanh form."""
    act = c.get("hidden_act", "gelu_pytorch_tanh")
    return _shared_gemma_config({**c, "hidden_act": "gelu_pytorch_tanh" if act == "gelu" else act})


def _shared_gemma_config(c: HfConfig, *handled: str) -> ModelConfig:
    _need(c, "head_dim")
    config = _shared_config({"tie_word_embeddings": True, **c}, "attention_bias", *handled)
    return replace(config, embed_scale=config.n_embd**0.5)


def gemma2(c: HfConfig) -> ModelConfig:
    c = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, **c}
    config = _local_gemma_config(c, 2, "attn_logit_softcapping")
    return replace(config, attn_softcap=_number(c.get("attn_logit_softcapping")))


def gemma3(c: HfConfig) -> ModelConfig:
    """Layers with a window rotate at a base of their own."""
    stated = c.get("rope_parameters") or {}
    if not set(stated) <= {_FULL, _SLIDING}:
        raise UnsupportedModelError("rope_parameters of gemma3_text must be given for each kind of layer")
    local = {"rope_theta": c.get("rope_local_base_freq"), "rope_scaling": None, "rope_parameters": stated.get(_SLIDING)}
    theta, scaling = _rope({**c, **local})
    if scaling:
        raise UnsupportedModelError(f"rope scaling {scaling.kind!r} of {_SLIDING} layers is not supported")
    full = {"rope_theta": c.get("rope_theta") or 1e6, **(c.get("rope_scaling") or {}), **(stated.get(_FULL) or {})}
    config = _local_gemma_config({**c, "rope_parameters": full}, int(c.get("sliding_window_pattern") or 6))
    return replace(config, qk_norm=True, local_rope_theta=theta)


def _local_gemma_config(c: HfConfig, pattern: int, *handled: str) -> ModelConfig:
    """Gemma 2 and 3: every `pattern`th layer sees all tokens, the others have a window."""
    c = {"sliding_window": 4096, **c, "hidden_act": c.get("hidden_activation") or "gelu_pytorch_tanh"}
    config = _shared_gemma_config(c, "sliding_window", "final_logit_softcapping", *handled)
    kinds = [_SLIDING if (i + 1) % pattern else _FULL for i in range(config.n_layer)]
    return replace(
        config,
        post_norm=True,
        windows=_windows(c, kinds),
        attn_scale=float(c.get("query_pre_attn_scalar") or 256) ** -0.5,
        logit_softcap=_number(c.get("final_logit_softcapping")),
    )


def _number(value: Any) -> float | None:
    return float(value) if value else None


def nanochat(c: HfConfig) -> ModelConfig:
    """It normalises q and k after rotating them; a norm without gains commutes with a rotation of the whole head."""
    c = {"final_logit_softcapping": 15.0, "hidden_act": "relu2", **c}
    config = _shared_config(c, "attention_bias", "final_logit_softcapping")
    cap = _number(c.get("final_logit_softcapping"))
    return replace(config, gated=False, qk_norm=True, rope_reversed=True, embed_norm=True, logit_softcap=cap)


def gpt2(c: HfConfig) -> ModelConfig:
    if c.get("scale_attn_by_inverse_layer_idx") or not c.get("scale_attn_weights", True):
        raise UnsupportedModelError(
            "GPT-2 with another scale of attention scores than 1/sqrt(head_dim) is not supported"
        )
    n_head, n_embd = int(_need(c, "n_head")), int(_need(c, "n_embd"))
    bias = bool(c.get("bias", True))
    return ModelConfig(
        n_layer=int(_need(c, "n_layer")),
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_embd,
        head_dim=n_embd // n_head,
        n_ff=int(c.get("n_inner") or 4 * n_embd),
        vocab_size=int(_need(c, "vocab_size")),
        context_length=int(c.get("n_positions") or _need(c, "n_ctx")),
        norm_eps=float(c.get("layer_norm_epsilon", 1e-5)),
        tie_embeddings=bool(c.get("tie_word_embeddings", True)),
        norm="layer",
        activation=_activation({"activation_function": "gelu_new", **c}, "activation_function"),
        gated=False,
        position="learned",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )
