"""config.json from a GGUF file's metadata: for each of llama.cpp's architectures, a row of keys and what they miss.

A GGUF file states fewer things than config.json. What llama.cpp has as constants in its code is a row's constant here;
what changes the model and is not understood is refused by its key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptedge.errors import CheckpointError, UnsupportedModelError
from gptedge.export.sources.gguf_container import Container

Json = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A file and the architecture that its keys begin with."""

    path: Path
    name: str
    file: Container

    def get(self, key: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"{self.name}.{key}")
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> Any:
        """A positive number; a list with one for each layer will do if they are equal."""
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path} has no {self.name}.{key} in its metadata")
        values = value if isinstance(value, list) and value else [value]
        if any(v != values[0] for v in values):
            raise self.unsupported(f"{self.name}.{key} differs from layer to layer, which is not supported")
        if isinstance(values[0], bool) or not isinstance(values[0], (int, float)) or not 0 < values[0] < math.inf:
            raise CheckpointError(
                f"{self.path}: {self.name}.{key} is {str(values[0])[:80]!r}; it must be a positive number"
            )
        return values[0]

    def unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.path}: {what}")


@dataclass(frozen=True)
class Architecture:
    hf_class: str
    model_type: str
    keys: Mapping[str, str]
    """Key of config.json -> key of the metadata, without the architecture's prefix; every one is needed."""
    optional_keys: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    extras: Callable[[Source, Json], Json] = lambda source, config: {}
    """What needs more than a key: the file and config.json so far -> more of it."""
    handled: tuple[str, ...] = ()
    """Keys of _REFUSED that the row reads."""


# ---- what the rows share -------------------------------------------------------------------------------------------


def _llama(source: Source, config: Json) -> Json:
    """What Llama-shaped models say beyond plain numbers. The defaults are llama.cpp's."""
    heads, tensors = config["num_attention_heads"], source.file.tensors
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rotary = source.number("rope.dimension_count", head_dim)
    if source.number("attention.value_length", head_dim) != head_dim:
        raise source.unsupported(f"{source.name}.attention.value_length is not the head's {head_dim}")
    theta = config.get("rope_theta", 10000.0)
    return {
        "num_key_value_heads": config.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "partial_rotary_factor": rotary / head_dim,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(source, theta, rotary),
        "attention_bias": any(f"blk.0.{name}.bias" in tensors for name in ("attn_q", "attn_qkv")),
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _qwen2(source: Source, config: Json) -> Json:
    """config.json says nothing of biases: the family has them."""
    return {k: v for k, v in _llama(source, config).items() if k != "attention_bias"}


def _phi3(source: Source, config: Json) -> Json:
    """Phi-3's long contexts: two lists of divisors as tensors. A window of 0 is none."""
    window = source.get("attention.sliding_window")
    return _llama(source, config) | {"sliding_window": window or None}


def _gpt_neox(source: Source, config: Json) -> Json:
    parallel = bool(source.get("use_parallel_residual", True))
    return _llama(source, config) | {"use_parallel_residual": parallel, "mlp_bias": False}


def _gemma(source: Source, config: Json) -> Json:
    return _llama(source, config) | {"tie_word_embeddings": True}


# Layers of the one size whose scores are scaled by the width of a head as hidden_size gives it.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def _local_gemma(source: Source, config: Json) -> Json:
    """Gemma 2 and 3. The file does not hold query_pre_attn_scalar: llama.cpp tells it by the number of layers."""
    shared = _gemma(source, config)
    largest = config["num_hidden_layers"] == _GEMMA_27B_LAYERS[source.name]
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else shared["head_dim"]
    if source.get("attention.scale"):
        scalar = source.number("attention.scale") ** -2
    return shared | {"query_pre_attn_scalar": scalar}


def _gemma2(source: Source, config: Json) -> Json:
    return _local_gemma(source, config) | _layer_types(source, config, 2)


def _gemma3(source: Source, config: Json) -> Json:
    local = source.number("rope.freq_base_swa", 10000.0)
    return _local_gemma(source, config) | {"rope_local_base_freq": local} | _layer_types(source, config, 6)


def _layer_types(source: Source, config: Json, period: int) -> Json:
    """Which layers have the window: the last of each period has none, or as a list says. No window: none has."""
    n_layer, stated = config["num_hidden_layers"], source.get("attention.sliding_window_pattern", period)
    if not isinstance(stated, list):
        period = int(source.number("attention.sliding_window_pattern", period))
        stated = [(i + 1) % period != 0 for i in range(n_layer)]
    local = [bool(x) and "sliding_window" in config for x in stated]
    return {"layer_types": ["sliding_attention" if x else "full_attention" for x in local]}


# ---- rotary scaling ------------------------------------------------------------------------------------------------

_LLAMA3, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
_LLAMA3_CONTEXT = 8192  # what Llama 3.1's and 3.2's scaling starts from; their files do not say
# config.json's key -> the metadata's, after rope.scaling.; yarn has two names for one factor
_YARN = {
    "attention_factor": "attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def _rope_scaling(source: Source, theta: float, rotary: int) -> Json | None:
    """config.json's `rope_scaling`, from the metadata or from the tensors that stand for llama3's and longrope's."""
    tensors = source.file.tensors
    if _LLAMA3 in tensors:
        return _llama3_scaling(source, theta, rotary)
    if _SHORT in tensors or _LONG in tensors:
        return _longrope_scaling(source)
    factor = source.get("rope.scaling.factor") or source.get("rope.scale_linear")
    kind = source.get("rope.scaling.type", "linear" if factor else "none")
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return None
    scaling: Json = {"rope_type": kind} | ({"factor": source.number("rope.scaling.factor", factor)} if factor else {})
    context = source.get("rope.scaling.original_context_length")
    scaling |= {} if context is None else {"original_max_position_embeddings": context}
    return scaling | (_yarn_numbers(source) if kind == "yarn" else {})


def _yarn_numbers(source: Source) -> Json:
    if source.get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise source.unsupported(f"{source.name}.rope.scaling.yarn_ext_factor is not 1, which is not supported")
    if source.get("rope.scaling.yarn_log_multiplier"):
        raise source.unsupported(f"{source.name}.rope.scaling.yarn_log_multiplier is not supported")
    stated = {ours: source.get(f"rope.scaling.{theirs}") for ours, theirs in _YARN.items()}
    stated["attention_factor"] = source.get("rope.scaling.yarn_attn_factor", stated["attention_factor"])
    return {key: value for key, value in stated.items() if value is not None}


def _longrope_scaling(source: Source) -> Json:
    tensors = source.file.tensors
    for name in (_SHORT, _LONG):
        if name not in tensors:
            raise CheckpointError(f"{source.path} has no tensor {name}, which goes with the other one of the two")
    short, long = ([float(x) for x in tensors[name].read().reshape(-1)] for name in (_SHORT, _LONG))
    original = source.number("rope.scaling.original_context_length")
    numbers = {"original_max_position_embeddings": original, "attention_factor": source.get("rope.scaling.attn_factor")}
    known = {key: value for key, value in numbers.items() if value is not None}
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long, **known}


def _llama3_scaling(source: Source, theta: float, rotary: int) -> Json | None:
    """The file holds what each frequency is divided by. Find the published parameters that give these very divisors."""
    factors = source.file.tensors[_LLAMA3].read().reshape(-1).astype(np.float64)
    if factors.shape == (rotary // 2,) and np.all(factors == 1):
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": round(float(factors.max(initial=1.0)), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": source.number("rope.scaling.original_context_length", _LLAMA3_CONTEXT),
    }
    expected = _llama3_divisors(scaling, theta, rotary)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise source.unsupported(f"the rotary factors in {_LLAMA3} are not those of llama3's scaling")
    return scaling


def _llama3_divisors(scaling: Json, theta: float, rotary: int) -> Any:
    frequency = theta ** (-np.arange(0, rotary, 2, dtype=np.float64) / rotary)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / (keep + (1 - keep) / scaling["factor"])


# ---- the rows ------------------------------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_RMS = _SIZES | {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
_OPTIONAL = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
}
_WINDOW = {"sliding_window": "attention.sliding_window"}
_SILU = {"hidden_act": "silu"}
_GELU_TANH = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}

# By general.architecture. Mistral's files say llama.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "llama", _RMS, _OPTIONAL | _WINDOW, _SILU, _llama),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", _RMS, _OPTIONAL, _SILU, _qwen2),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", _RMS, _OPTIONAL, _SILU, _llama),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", _RMS, _OPTIONAL, _SILU, _phi3),
    "olmo2": Architecture("Olmo2ForCausalLM", "olmo2", _RMS, _OPTIONAL | _WINDOW, _SILU, _llama),
    "gptneox": Architecture(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        _SIZES | {"layer_norm_eps": "attention.layer_norm_epsilon"},
        _OPTIONAL,
        {"hidden_act": "gelu"},
        _gpt_neox,
        handled=("use_parallel_residual",),
    ),
    "gemma": Architecture("GemmaForCausalLM", "gemma", _RMS, _OPTIONAL, _GELU_TANH, _gemma),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        "gemma2",
        _RMS,
        _OPTIONAL | _WINDOW | _CAPS,
        {**_GELU_TANH, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _gemma2,
        handled=(*_CAPS, "attention.scale"),
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _RMS,
        _OPTIONAL | _WINDOW | {"final_logit_softcapping": "final_logit_softcapping"},
        {**_GELU_TANH, "rope_theta": 1000000.0},
        _gemma3,
        handled=("final_logit_softcapping", "attention.scale"),
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "gpt2",
        {
            "n_embd": "embedding_length",
            "n_inner": "feed_forward_length",
            "n_layer": "block_count",
            "n_head": "attention.head_count",
            "n_positions": "context_length",
            "layer_norm_epsilon": "attention.layer_norm_epsilon",
        },
        constants={"activation_function": "gelu_new"},
    ),
}

# Keys that change what the model computes in ways that most rows cannot say -> the values that change nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}


def read_config(path: Path, file: Container, ids: Mapping[str, Any]) -> Json:
    """config.json; `ids` are the tokenizer's bos_token_id and the like. CheckpointError or UnsupportedModelError."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{path} has no general.architecture; it is not a language model's GGUF file")
    source = Source(path, name, file)
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise source.unsupported(f"GGUF architecture {name!r} is not supported; supported are {known}")
    row = ARCHITECTURES[name]
    _refuse(source, row)
    config: Json = {
        "architectures": [row.hf_class],
        "model_type": row.model_type,
        "vocab_size": _vocab_size(source),
        **row.constants,
        **{ours: source.number(theirs) for ours, theirs in row.keys.items()},
        **{ours: source.number(theirs) for ours, theirs in row.optional_keys.items() if source.get(theirs)},
    }
    config |= {"tie_word_embeddings": "output.weight" not in file.tensors} | row.extras(source, config)
    return config | dict(ids) | {"torch_dtype": "float32"}


def _refuse(source: Source, row: Architecture) -> None:
    parts = source.file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise source.unsupported(f"it is one of {parts} split files; merge them with llama-gguf-split --merge first")
    for key, harmless in _REFUSED.items():
        value = source.get(key, harmless[0])
        if key not in row.handled and value not in harmless:
            raise source.unsupported(f"{source.name}.{key} is {value!r}, which is not supported")


def _vocab_size(source: Source) -> int:
    table = source.file.tensors.get("token_embd.weight")
    if table is None:
        raise CheckpointError(f"{source.path} has no tensor token_embd.weight")
    return table.shape[0]
