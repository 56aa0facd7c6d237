"""GGUF files (llama.cpp's format) as Hugging Face checkpoints: config.json, tensors and side files, made on opening.

Weights are dequantized to float32 one tensor at a time, when read. What each architecture calls its keys and tensors is
a row of `_ARCHITECTURES`; one that has no row is refused by name. Split files and mixtures of experts are not read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptedge.checkpoint import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, Checkpoint
from gptedge.errors import CheckpointError, UnsupportedModelError
from gptedge.export.sources import gguf_container
from gptedge.export.sources.gguf_tokenizer import GgufTokenizer, read_tokenizer
from gptedge.safetensors import FloatArray, Tensor

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class _Architecture:
    hf_class: str
    model_type: str
    keys: Mapping[str, str]
    """Key of config.json -> key of the metadata, without the architecture's prefix; every one is needed."""
    optional_keys: Mapping[str, str]
    constants: Mapping[str, Any]
    tensors: Mapping[str, str]
    """GGUF's name -> Hugging Face's, without .weight and .bias; {i} is the layer."""
    rotated: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose rows llama.cpp's converter regroups for interleaved rotary embeddings -> config.json's key of the
    number of heads."""
    transposed: tuple[str, ...] = ()
    """Matrices that Hugging Face stores as [in, out] (GPT-2's Conv1D)."""


_LLAMA_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_LLAMA_OPTIONAL_KEYS = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
_LLAMA_TENSORS = {
    "token_embd": "model.embed_tokens",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_QK_NORMS = {
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
}
_GPT2_TENSORS = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "blk.{i}.attn_norm": "transformer.h.{i}.ln_1",
    "blk.{i}.attn_qkv": "transformer.h.{i}.attn.c_attn",
    "blk.{i}.attn_output": "transformer.h.{i}.attn.c_proj",
    "blk.{i}.ffn_norm": "transformer.h.{i}.ln_2",
    "blk.{i}.ffn_up": "transformer.h.{i}.mlp.c_fc",
    "blk.{i}.ffn_down": "transformer.h.{i}.mlp.c_proj",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_SILU = {"hidden_act": "silu"}

# By general.architecture. Mistral's files say llama.
_ARCHITECTURES: dict[str, _Architecture] = {
    "llama": _Architecture(
        "LlamaForCausalLM",
        "llama",
        _LLAMA_KEYS,
        _LLAMA_OPTIONAL_KEYS,
        _SILU,
        _LLAMA_TENSORS,
        rotated={"blk.{i}.attn_q": "num_attention_heads", "blk.{i}.attn_k": "num_key_value_heads"},
    ),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2", _LLAMA_KEYS, _LLAMA_OPTIONAL_KEYS, _SILU, _LLAMA_TENSORS),
    "qwen3": _Architecture(
        "Qwen3ForCausalLM", "qwen3", _LLAMA_KEYS, _LLAMA_OPTIONAL_KEYS, _SILU, _LLAMA_TENSORS | _QK_NORMS
    ),
    "gpt2": _Architecture(
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
        {},
        {"activation_function": "gelu_new"},
        _GPT2_TENSORS,
        transposed=("blk.{i}.attn_qkv", "blk.{i}.attn_output", "blk.{i}.ffn_up", "blk.{i}.ffn_down"),
    ),
}
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_CONTEXT = 8192  # what Llama 3.1's and 3.2's scaling starts from; their files do not say
_IGNORED = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?|" + re.escape(_ROPE_FACTORS))  # not weights

# Keys that change what the model computes in ways that config.json cannot say -> the values that change nothing.
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


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file as a checkpoint. CheckpointError: it is damaged. UnsupportedModelError: it is something else."""
    path = Path(path)
    file = gguf_container.read(path)
    architecture = _architecture(path, file.metadata)
    tokenizer = read_tokenizer(path, file.metadata)
    config = _config(path, architecture, file, tokenizer)
    tensors = {
        hf_name: tensor
        for name, stored in file.tensors.items()
        if not _IGNORED.fullmatch(name)
        for hf_name, tensor in [_hf_tensor(path, architecture, config, name, stored)]
    }
    return Checkpoint(path, config, tensors, _side_files(file.metadata, config, tokenizer))


def _architecture(path: Path, metadata: Metadata) -> _Architecture:
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{path} has no general.architecture; it is not a language model's GGUF file")
    if name not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UnsupportedModelError(f"{path}: GGUF architecture {name!r} is not supported; supported are {known}")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModelError(
            f"{path} is one of {metadata['split.count']} split files; merge them with llama-gguf-split --merge first"
        )
    for key, harmless in _REFUSED.items():
        value = metadata.get(f"{name}.{key}", harmless[0])
        if value not in harmless:
            raise UnsupportedModelError(f"{path}: {name}.{key} is {value!r}, which is not supported")
    return _ARCHITECTURES[name]


# ---- config.json ---------------------------------------------------------------------------------------------------


def _config(
    path: Path, architecture: _Architecture, file: gguf_container.Container, tokenizer: GgufTokenizer | None
) -> dict[str, Any]:
    name = file.metadata["general.architecture"]
    config: dict[str, Any] = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "vocab_size": len(tokenizer.tokens) if tokenizer else _embedding_rows(path, file),
    }
    for ours, theirs in architecture.keys.items():
        config[ours] = _uniform(path, file.metadata, f"{name}.{theirs}")
    for ours, theirs in architecture.optional_keys.items():
        if file.metadata.get(f"{name}.{theirs}"):
            config[ours] = _uniform(path, file.metadata, f"{name}.{theirs}")
    config |= architecture.constants
    if "rms_norm_eps" in config:
        config |= _llama_extras(path, config, file)
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config |= tokenizer.ids if tokenizer else {}
    return config | {"torch_dtype": "float32"}


def _uniform(path: Path, metadata: Metadata, key: str) -> Any:
    """A number; a list with one for each layer will do if they are equal."""
    value = metadata.get(key)
    if value is None:
        raise CheckpointError(f"{path} has no {key} in its metadata")
    values = value if isinstance(value, list) and value else [value]
    if any(v != values[0] for v in values):
        raise UnsupportedModelError(f"{path}: {key} differs from layer to layer, which is not supported")
    return _positive(path, key, values[0])


def _positive(path: Path, key: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: {key} is {str(value)[:80]!r}; it must be a positive number")
    return value


def _embedding_rows(path: Path, file: gguf_container.Container) -> int:
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{path} has no tensor token_embd.weight")
    return file.tensors["token_embd.weight"].shape[0]


def _llama_extras(path: Path, config: dict[str, Any], file: gguf_container.Container) -> dict[str, Any]:
    """What Llama-shaped models say beyond plain numbers. The defaults are llama.cpp's."""
    name = file.metadata["general.architecture"]
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or (width // heads if heads else 0)
    for key in ("rope.dimension_count", "attention.value_length"):
        value = file.metadata.get(f"{name}.{key}", head_dim)
        if value != head_dim:
            raise UnsupportedModelError(f"{path}: {name}.{key} is {value}; only the head's {head_dim} is supported")
    theta = config.get("rope_theta", 10000.0)
    return {
        "num_key_value_heads": config.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(path, name, file, theta, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _rope_scaling(
    path: Path, name: str, file: gguf_container.Container, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """config.json's `rope_scaling`, from the metadata or from the tensor that stands for llama3's."""
    if _ROPE_FACTORS in file.tensors:
        return _llama3_scaling(path, name, file, theta, head_dim)
    metadata = file.metadata
    factor = metadata.get(f"{name}.rope.scaling.factor") or metadata.get(f"{name}.rope.scale_linear")
    kind = metadata.get(f"{name}.rope.scaling.type", "linear" if factor else "none")
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return None
    scaling = {"rope_type": kind, "factor": _positive(path, f"{name}.rope.scaling.factor", factor)}
    context = metadata.get(f"{name}.rope.scaling.original_context_length")
    return scaling if context is None else scaling | {"original_max_position_embeddings": context}


def _llama3_scaling(
    path: Path, name: str, file: gguf_container.Container, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """The file holds what each frequency is divided by. Find the published parameters that give these very divisors."""
    factors = file.tensors[_ROPE_FACTORS].read().reshape(-1).astype(np.float64)
    if factors.shape == (head_dim // 2,) and np.all(factors == 1):
        return None
    context = file.metadata.get(f"{name}.rope.scaling.original_context_length", _LLAMA3_CONTEXT)
    scaling = {
        "rope_type": "llama3",
        "factor": round(float(factors.max(initial=1.0)), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _positive(path, "original_context_length", context),
    }
    expected = _llama3_divisors(scaling, theta, head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UnsupportedModelError(f"{path}: the rotary factors in {_ROPE_FACTORS} are not those of llama3's scaling")
    return scaling


def _llama3_divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> FloatArray:
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / (keep + (1 - keep) / scaling["factor"]), np.float32)


# ---- tensors -------------------------------------------------------------------------------------------------------


def _hf_tensor(
    path: Path, architecture: _Architecture, config: dict[str, Any], name: str, stored: Tensor
) -> tuple[str, Tensor]:
    """Hugging Face's name of a tensor, and the tensor in Hugging Face's layout."""
    layer = re.match(r"blk\.(\d+)\.", name)
    stem, _, kind = name.rpartition(".")
    key = stem if not layer else f"blk.{{i}}.{stem[layer.end() :]}"
    if key not in architecture.tensors or kind not in ("weight", "bias"):
        raise UnsupportedModelError(f"{path}: the tensor {name} is not one that {architecture.hf_class} has")
    hf_name = f"{architecture.tensors[key].format(i=layer[1] if layer else '')}.{kind}"
    if key in architecture.rotated:
        return hf_name, _unrotated(path, name, stored, config[architecture.rotated[key]])
    if key in architecture.transposed and kind == "weight":
        return hf_name, Tensor(stored.shape[::-1], stored.dtype, lambda: np.ascontiguousarray(stored.read().T))
    return hf_name, stored


def _unrotated(path: Path, name: str, stored: Tensor, heads: int) -> Tensor:
    """Rows of each head from (half, 2), pairs side by side, back to (2, half), first halves first."""
    rows = stored.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{path}: {name} has {rows} rows, which {heads} heads do not divide into pairs")

    def read() -> FloatArray:
        array = stored.read()
        paired = array.reshape(heads, rows // heads // 2, 2, *array.shape[1:])
        return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(array.shape)

    return Tensor(stored.shape, stored.dtype, read)


# ---- side files ----------------------------------------------------------------------------------------------------


def _side_files(metadata: Metadata, config: dict[str, Any], tokenizer: GgufTokenizer | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    context = config.get("max_position_embeddings") or config["n_positions"]
    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    files = {
        TOKENIZER: _json(tokenizer.tokenizer_json, indent=None),
        TOKENIZER_CONFIG: _json(
            tokenizer.tokenizer_config
            | {"model_max_length": context, "clean_up_tokenization_spaces": False}
            | ({"chat_template": template} if template else {})
        ),
        GENERATION_CONFIG: _json(tokenizer.ids | tokenizer.stop_ids),
    }
    return files | ({CHAT_TEMPLATE: template.encode()} if template else {})


def _json(value: Any, *, indent: int | None = 2) -> bytes:
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()
