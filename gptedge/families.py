"""Model families as rows of one table: how each writes its configuration and what it calls its tensors.

Everything after this module uses gptedge's own names, whose shapes are those of torch.nn.Linear, [out, in]:

    embed.weight [vocab, n_embd]     position.weight [context, n_embd]   (learned positions only)
    blocks.{i}.attn_norm.weight      blocks.{i}.attn.{q,k,v,o}.weight    blocks.{i}.attn.{q,k}_norm.weight
    blocks.{i}.mlp_norm.weight       blocks.{i}.mlp.{gate,up,down}.weight
    blocks.{i}.{attn,mlp}_post_norm.weight   embed_norm.weight           (where outputs, or embeddings, are normalised)
    norm.weight                      head.weight [vocab, n_embd]         (absent when tied)

and .bias beside a .weight where the family has one. A new family is a new row, not a new branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from gptedge.config import Activation, ModelConfig, RopeScaling
from gptedge.errors import CheckpointError, UnsupportedModelError
from gptedge.safetensors import FloatArray, Tensor

HfConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """Where a tensor lies in the publisher's files."""

    name: str
    rows: str = ""
    """The part of a fused matrix's output rows: q, k or v of one qkv matrix, gate or up of one; empty is all of them."""
    per_head: bool = False
    """The fused parts alternate head by head: q, k and v of the first head, then of the second (GPT-NeoX)."""
    transpose: bool = False
    """Stored as [in, out] (GPT-2's Conv1D)."""
    plus: float = 0.0
    """Added to what is stored; with no name, nothing is, and this is all."""


@dataclass(frozen=True)
class Family:
    name: str
    architectures: tuple[str, ...]
    """Values of `architectures` in config.json."""
    config: Callable[[HfConfig], ModelConfig]
    parts: Mapping[str, Part]
    """gptedge's name, with {i} for the layer -> where it is stored."""
    prefixes: tuple[str, ...] = ("",)
    """Prefixes some publishers put before, or leave out of, every name."""
    ignored: tuple[str, ...] = ()
    """Endings of stored tensors that are not weights (buffers)."""


# ---- configurations ------------------------------------------------------------------------------------------------

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
    "attn_logit_softcapping": (0.0,),
    "clip_qkv": (),
    "final_logit_softcapping": (0.0,),
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
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float(rope["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_context_length=int(rope["original_max_position_embeddings"]),
        )
    raise UnsupportedModelError(f"rope scaling {kind!r} is not supported; known are default, linear and llama3")


def _rotary_dim(c: HfConfig, head_dim: int, default: float = 1.0) -> int | None:
    """Dimensions of a head that rotate, as ModelConfig has it; `rotary_pct` is GPT-NeoX's older name of the fraction."""
    rope = c.get("rope_parameters") or {}
    stated = (rope.get("partial_rotary_factor"), c.get("partial_rotary_factor"), c.get("rotary_pct"), default)
    dim = int(head_dim * float(next(v for v in stated if v is not None)))
    return None if dim == head_dim else dim


_SLIDING, _FULL = "sliding_attention", "full_attention"


def _windows(c: HfConfig, kinds: Sequence[str], *, fixed: bool = False) -> tuple[int, ...]:
    """Each layer's window. `kinds` is what layers are where `layer_types` does not say, or (`fixed`) whatever it says."""
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
    bias = bool(c.get("attention_bias", False))
    return ModelConfig(
        n_layer=int(_need(c, "num_hidden_layers")),
        n_head=n_head,
        n_kv_head=int(c.get("num_key_value_heads") or n_head),
        n_embd=n_embd,
        head_dim=int(c.get("head_dim") or n_embd // n_head),
        n_ff=int(_need(c, "intermediate_size")),
        vocab_size=int(_need(c, "vocab_size")),
        context_length=int(_need(c, "max_position_embeddings")),
        norm_eps=float(c.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(c.get("tie_word_embeddings", False)),
        activation=_activation(c, "hidden_act"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(c.get("mlp_bias", False)),
    )


def _llama_config(c: HfConfig) -> ModelConfig:
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


def _mistral_config(c: HfConfig) -> ModelConfig:
    return _sliding_config({"sliding_window": 4096, **c})


def _phi3_config(c: HfConfig) -> ModelConfig:
    config = _sliding_config({"rms_norm_eps": 1e-5, **c}, "partial_rotary_factor")
    return replace(config, rotary_dim=_rotary_dim(c, config.head_dim))


def _qwen_config(c: HfConfig) -> ModelConfig:
    """Qwen 2 and 3: with use_sliding_window, a window from layer max_window_layers on."""
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    config = _shared_config(c, "sliding_window", "attention_bias")
    first = int(c.get("max_window_layers", 28)) if window else config.n_layer
    kinds = [_SLIDING if i >= first else _FULL for i in range(config.n_layer)]
    return replace(config, windows=_useful(_windows({**c, "sliding_window": window}, kinds), config))


def _qwen2_config(c: HfConfig) -> ModelConfig:
    return replace(_qwen_config(c), qkv_bias=True, out_bias=False)


def _qwen3_config(c: HfConfig) -> ModelConfig:
    return replace(_qwen_config(c), qk_norm=True)


def _olmo2_config(c: HfConfig) -> ModelConfig:
    config = _shared_config({"rms_norm_eps": 1e-5, **c}, "attention_bias")
    return replace(config, qk_norm=True, qk_norm_joint=True, pre_norm=False, post_norm=True)


def _gpt_neox_config(c: HfConfig) -> ModelConfig:
    renamed = {"rope_theta": c.get("rotary_emb_base"), "rms_norm_eps": c.get("layer_norm_eps", 1e-5)}
    config = _shared_config(
        {"hidden_act": "gelu", "attention_bias": True, **c, **{k: v for k, v in renamed.items() if v is not None}},
        "attention_bias",
        "use_parallel_residual",
        "partial_rotary_factor",
    )
    return replace(
        config,
        n_kv_head=config.n_head,
        rotary_dim=_rotary_dim(c, config.head_dim, 0.25),
        norm="layer",
        gated=False,
        mlp_bias=True,
        parallel=bool(c.get("use_parallel_residual", True)),
    )


def _gemma_config(c: HfConfig) -> ModelConfig:
    """Gemma 1. Its `gelu` has always meant the tanh form."""
    act = c.get("hidden_act", "gelu_pytorch_tanh")
    return _shared_gemma_config({**c, "hidden_act": "gelu_pytorch_tanh" if act == "gelu" else act})


def _shared_gemma_config(c: HfConfig, *handled: str) -> ModelConfig:
    _need(c, "head_dim")
    config = _shared_config({"tie_word_embeddings": True, **c}, "attention_bias", *handled)
    return replace(config, embed_scale=config.n_embd**0.5)


def _gemma2_config(c: HfConfig) -> ModelConfig:
    c = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, **c}
    config = _local_gemma_config(c, 2, "attn_logit_softcapping")
    return replace(config, attn_softcap=_number(c.get("attn_logit_softcapping")))


def _gemma3_config(c: HfConfig) -> ModelConfig:
    """Layers with a window rotate at a base of their own."""
    stated = c.get("rope_parameters") or {}
    if not set(stated) <= {_FULL, _SLIDING}:
        raise UnsupportedModelError("rope_parameters of gemma3_text must be given for each kind of layer")
    theta, scaling = _rope({"rope_theta": c.get("rope_local_base_freq"), "rope_parameters": stated.get(_SLIDING)})
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


def _nanochat_config(c: HfConfig) -> ModelConfig:
    """It normalises q and k after rotating them; a norm without gains commutes with a rotation of the whole head."""
    c = {"final_logit_softcapping": 15.0, "hidden_act": "relu2", **c}
    config = _shared_config(c, "attention_bias", "final_logit_softcapping")
    cap = _number(c.get("final_logit_softcapping"))
    return replace(config, gated=False, qk_norm=True, rope_reversed=True, embed_norm=True, logit_softcap=cap)


def _gpt2_config(c: HfConfig) -> ModelConfig:
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


# ---- names ---------------------------------------------------------------------------------------------------------


def _both(table: Mapping[str, Part]) -> dict[str, Part]:
    """Weights and biases of the same modules."""
    return {
        f"{ours}.{kind}": replace(part, name=f"{part.name}.{kind}")
        for kind in ("weight", "bias")
        for ours, part in table.items()
    }


_LLAMA_PARTS = _both(
    {
        "embed": Part("model.embed_tokens"),
        "blocks.{i}.attn_norm": Part("model.layers.{i}.input_layernorm"),
        "blocks.{i}.attn.q": Part("model.layers.{i}.self_attn.q_proj"),
        "blocks.{i}.attn.k": Part("model.layers.{i}.self_attn.k_proj"),
        "blocks.{i}.attn.v": Part("model.layers.{i}.self_attn.v_proj"),
        "blocks.{i}.attn.q_norm": Part("model.layers.{i}.self_attn.q_norm"),
        "blocks.{i}.attn.k_norm": Part("model.layers.{i}.self_attn.k_norm"),
        "blocks.{i}.attn.o": Part("model.layers.{i}.self_attn.o_proj"),
        "blocks.{i}.mlp_norm": Part("model.layers.{i}.post_attention_layernorm"),
        "blocks.{i}.mlp.gate": Part("model.layers.{i}.mlp.gate_proj"),
        "blocks.{i}.mlp.up": Part("model.layers.{i}.mlp.up_proj"),
        "blocks.{i}.mlp.down": Part("model.layers.{i}.mlp.down_proj"),
        "norm": Part("model.norm"),
        "head": Part("lm_head"),
    }
)

_FUSED_LLAMA_PARTS = _LLAMA_PARTS | _both(
    {
        **{f"blocks.{{i}}.attn.{x}": Part("model.layers.{i}.self_attn.qkv_proj", rows=x) for x in ("q", "k", "v")},
        **{f"blocks.{{i}}.mlp.{x}": Part("model.layers.{i}.mlp.gate_up_proj", rows=x) for x in ("gate", "up")},
    }
)

_POST_NORMS = _both(
    {
        "blocks.{i}.attn_post_norm": Part("model.layers.{i}.post_attention_layernorm"),
        "blocks.{i}.mlp_post_norm": Part("model.layers.{i}.post_feedforward_layernorm"),
    }
)

_GAINS = [name for name in _LLAMA_PARTS | _POST_NORMS if name.endswith("norm.weight")]


def _one_more(table: Mapping[str, Part]) -> dict[str, Part]:
    """Gemma's norms are stored as the gain less one."""
    return {ours: replace(part, plus=1.0) if ours in _GAINS else part for ours, part in table.items()}


_GEMMA_PARTS = _one_more(_LLAMA_PARTS)
_GEMMA2_PARTS = _one_more(
    _LLAMA_PARTS | _POST_NORMS | _both({"blocks.{i}.mlp_norm": Part("model.layers.{i}.pre_feedforward_layernorm")})
)

_NANOCHAT_PARTS = {
    **_LLAMA_PARTS,
    **dict.fromkeys(["embed_norm.weight", *_GAINS], Part("", plus=1.0)),
    **_both(
        {
            "blocks.{i}.mlp.up": Part("model.layers.{i}.mlp.fc1"),
            "blocks.{i}.mlp.down": Part("model.layers.{i}.mlp.fc2"),
        }
    ),
}

_GPT_NEOX_PARTS = _both(
    {
        "embed": Part("gpt_neox.embed_in"),
        "blocks.{i}.attn_norm": Part("gpt_neox.layers.{i}.input_layernorm"),
        **{
            f"blocks.{{i}}.attn.{x}": Part("gpt_neox.layers.{i}.attention.query_key_value", rows=x, per_head=True)
            for x in ("q", "k", "v")
        },
        "blocks.{i}.attn.o": Part("gpt_neox.layers.{i}.attention.dense"),
        "blocks.{i}.mlp_norm": Part("gpt_neox.layers.{i}.post_attention_layernorm"),
        "blocks.{i}.mlp.up": Part("gpt_neox.layers.{i}.mlp.dense_h_to_4h"),
        "blocks.{i}.mlp.down": Part("gpt_neox.layers.{i}.mlp.dense_4h_to_h"),
        "norm": Part("gpt_neox.final_layer_norm"),
        "head": Part("embed_out"),
    }
)

_GPT2_PARTS = _both(
    {
        "embed": Part("wte"),
        "position": Part("wpe"),
        "blocks.{i}.attn_norm": Part("h.{i}.ln_1"),
        "blocks.{i}.attn.q": Part("h.{i}.attn.c_attn", rows="q", transpose=True),
        "blocks.{i}.attn.k": Part("h.{i}.attn.c_attn", rows="k", transpose=True),
        "blocks.{i}.attn.v": Part("h.{i}.attn.c_attn", rows="v", transpose=True),
        "blocks.{i}.attn.o": Part("h.{i}.attn.c_proj", transpose=True),
        "blocks.{i}.mlp_norm": Part("h.{i}.ln_2"),
        "blocks.{i}.mlp.up": Part("h.{i}.mlp.c_fc", transpose=True),
        "blocks.{i}.mlp.down": Part("h.{i}.mlp.c_proj", transpose=True),
        "norm": Part("ln_f"),
        "head": Part("lm_head"),
    }
)

# The same modules, with torch's linear layers in the place of Conv1D.
_NANOGPT_PARTS = {ours: replace(part, transpose=False) for ours, part in _GPT2_PARTS.items()}

FAMILIES: tuple[Family, ...] = (
    Family("llama", ("LlamaForCausalLM",), _llama_config, _LLAMA_PARTS, ignored=(".rotary_emb.inv_freq",)),
    Family("mistral", ("MistralForCausalLM",), _mistral_config, _LLAMA_PARTS),
    Family("qwen2", ("Qwen2ForCausalLM",), _qwen2_config, _LLAMA_PARTS),
    Family("qwen3", ("Qwen3ForCausalLM",), _qwen3_config, _LLAMA_PARTS),
    Family("phi3", ("Phi3ForCausalLM",), _phi3_config, _FUSED_LLAMA_PARTS),
    Family("olmo2", ("Olmo2ForCausalLM",), _olmo2_config, _LLAMA_PARTS | _POST_NORMS),
    Family(
        "gpt_neox",
        ("GPTNeoXForCausalLM",),
        _gpt_neox_config,
        _GPT_NEOX_PARTS,
        ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
    Family("gemma", ("GemmaForCausalLM",), _gemma_config, _GEMMA_PARTS),
    Family("gemma2", ("Gemma2ForCausalLM",), _gemma2_config, _GEMMA2_PARTS),
    Family("gemma3_text", ("Gemma3ForCausalLM",), _gemma3_config, _GEMMA2_PARTS),
    Family("nanochat", ("NanoChatForCausalLM",), _nanochat_config, _NANOCHAT_PARTS),
    Family(
        "gpt2",
        ("GPT2LMHeadModel", "GPT2Model"),
        _gpt2_config,
        _GPT2_PARTS,
        prefixes=("transformer.", ""),
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    Family(
        "nanogpt", ("NanoGPT",), _gpt2_config, _NANOGPT_PARTS, prefixes=("transformer.", ""), ignored=(".attn.bias",)
    ),
)


# ---- the engine ----------------------------------------------------------------------------------------------------


def family_of(config: HfConfig) -> Family:
    """The row for a config.json. Raises UnsupportedModelError naming the architecture."""
    names = config.get("architectures") or []
    for family in FAMILIES:
        if set(names) & set(family.architectures):
            return family
    for family in FAMILIES if not names else ():
        if config.get("model_type") == family.name:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    shown = ", ".join(map(str, names)) or config.get("model_type") or "none named"
    raise UnsupportedModelError(f"architecture {shown} is not supported; supported are {known}")


def tensor_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a model of this configuration has, by gptedge's names, in the order of the forward pass."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (c.vocab_size, c.n_embd)}
    if c.position == "learned":
        shapes["position.weight"] = (c.context_length, c.n_embd)

    def linear(name: str, n_out: int, n_in: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (n_out, n_in)
        if bias:
            shapes[f"{name}.bias"] = (n_out,)

    def norm(name: str, width: int = c.n_embd) -> None:
        shapes[f"{name}.weight"] = (width,)
        if (
            c.norm == "layer" and c.mlp_bias
        ):  # in nanoGPT and GPT-2 alike, LayerNorm's bias goes with the linear layers'
            shapes[f"{name}.bias"] = (width,)

    if c.embed_norm:
        norm("embed_norm")
    for i in range(c.n_layer):
        b = f"blocks.{i}"
        if c.pre_norm:
            norm(f"{b}.attn_norm")
        linear(f"{b}.attn.q", c.q_size, c.n_embd, c.qkv_bias)
        linear(f"{b}.attn.k", c.kv_size, c.n_embd, c.qkv_bias)
        linear(f"{b}.attn.v", c.kv_size, c.n_embd, c.qkv_bias)
        if c.qk_norm:
            norm(f"{b}.attn.q_norm", c.q_size if c.qk_norm_joint else c.head_dim)
            norm(f"{b}.attn.k_norm", c.kv_size if c.qk_norm_joint else c.head_dim)
        linear(f"{b}.attn.o", c.n_embd, c.q_size, c.out_bias)
        if c.post_norm:
            norm(f"{b}.attn_post_norm")
        if c.pre_norm:
            norm(f"{b}.mlp_norm")
        if c.gated:
            linear(f"{b}.mlp.gate", c.n_ff, c.n_embd, c.mlp_bias)
        linear(f"{b}.mlp.up", c.n_ff, c.n_embd, c.mlp_bias)
        linear(f"{b}.mlp.down", c.n_embd, c.n_ff, c.mlp_bias)
        if c.post_norm:
            norm(f"{b}.mlp_post_norm")
    norm("norm")
    if not c.tie_embeddings:
        linear("head", c.vocab_size, c.n_embd, False)
    return shapes


def source_tensors(family: Family, config: ModelConfig, stored: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A publisher's tensors by gptedge's names. Raises CheckpointError naming any missing, misshapen or unused one."""
    used: set[str] = set()
    found: dict[str, Tensor] = {}
    for name, shape in tensor_shapes(config).items():
        part, layer = _part_of(family, name)
        if not part.name:
            found[name] = _constant(shape, part.plus)
            continue
        stored_name = _find(family, part.name.format(i=layer), stored, name, where)
        used.add(stored_name)
        found[name] = _view(stored[stored_name], part, config, shape, f"{where}: {stored_name}")
    spare = [
        n
        for n in stored
        if n not in used and not n.endswith(family.ignored or ("\0",)) and not _is_tied_head(n, config)
    ]
    if spare:
        raise CheckpointError(
            f"{where} has {len(spare)} tensors that {family.name} does not use, the first of them {sorted(spare)[0]}"
        )
    return found


def _part_of(family: Family, name: str) -> tuple[Part, str]:
    pieces = name.split(".")
    layer = pieces[1] if pieces[0] == "blocks" else ""
    key = ".".join(["blocks", "{i}", *pieces[2:]]) if layer else name
    return family.parts[key], layer


def _find(family: Family, name: str, stored: Mapping[str, Tensor], ours: str, where: str) -> str:
    for prefix in family.prefixes:
        if prefix + name in stored:
            return prefix + name
    raise CheckpointError(f"{where} has no tensor {family.prefixes[0]}{name} ({ours})")


def _constant(shape: tuple[int, ...], value: float) -> Tensor:
    return Tensor(shape, "F32", lambda: np.full(shape, value, np.float32))


_FUSED = (("q", "k", "v"), ("gate", "up"))


def _span(rows: str, c: ModelConfig) -> tuple[int, int, int]:
    """Where a part lies in its fused matrix: (first row, rows, rows of the whole)."""
    sizes = {"q": c.q_size, "k": c.kv_size, "v": c.kv_size, "gate": c.n_ff, "up": c.n_ff}
    group = next(group for group in _FUSED if rows in group)
    before = group[: group.index(rows)]
    return sum(sizes[x] for x in before), sizes[rows], sum(sizes[x] for x in group)


def _view(tensor: Tensor, part: Part, c: ModelConfig, shape: tuple[int, ...], what: str) -> Tensor:
    first, count, total = _span(part.rows, c) if part.rows else (0, shape[0], shape[0])
    full = (total, *shape[1:])
    expected = full[::-1] if part.transpose else full
    if tensor.shape != expected:
        raise CheckpointError(f"{what} has the shape {list(tensor.shape)}; config.json implies {list(expected)}")
    if not part.rows and not part.transpose and not part.plus:
        return tensor
    heads = c.n_head if part.per_head else 1

    def read() -> FloatArray:
        array = tensor.read()
        array = array.T if part.transpose else array
        each = array.reshape(heads, total // heads, *shape[1:])[:, first // heads : (first + count) // heads]
        rows = np.ascontiguousarray(each).reshape(shape)
        return rows + np.float32(part.plus) if part.plus else rows

    return Tensor(shape, tensor.dtype, read)


def _is_tied_head(name: str, config: ModelConfig) -> bool:
    return config.tie_embeddings and name.endswith(("lm_head.weight", "embed_out.weight"))


# ---- writing: gptedge's own checkpoints are Llama's ----------------------------------------------------------------


def checkpoint_name(name: str) -> str:
    """The name Llama's checkpoints give to one of our tensors."""
    part, layer = _part_of(FAMILIES[0], name)
    return part.name.format(i=layer)


_WRITTEN = frozenset(
    "n_layer n_head n_kv_head n_embd head_dim n_ff vocab_size context_length norm_eps rope_theta "
    "tie_embeddings activation qkv_bias out_bias mlp_bias".split()
)


def hf_config(c: ModelConfig) -> dict[str, Any]:
    """config.json of a Llama-shaped model. Raises UnsupportedModelError when the configuration is not Llama's."""
    other = [f.name for f in fields(c) if f.name not in _WRITTEN and getattr(c, f.name) != f.default]
    if other or c.qkv_bias != c.out_bias:
        raise UnsupportedModelError(
            "only Llama-shaped models (RMSNorm, plain RoPE, gated feed-forward) can be written; "
            f"this one differs in {', '.join(other) or 'qkv_bias or out_bias alone'}"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "intermediate_size": c.n_ff,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "hidden_act": c.activation,
        "max_position_embeddings": c.context_length,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "torch_dtype": "float32",
    }
