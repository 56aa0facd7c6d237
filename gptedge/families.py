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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from gptedge import family_configs as configs
from gptedge import tensor_names as names
from gptedge.config import ModelConfig
from gptedge.errors import CheckpointError, UnsupportedModelError
from gptedge.family_configs import HfConfig
from gptedge.safetensors import FloatArray, Tensor
from gptedge.tensor_names import Naming, Part


@dataclass(frozen=True)
class Family:
    name: str
    architectures: tuple[str, ...]
    """Values of `architectures` in config.json."""
    config: Callable[[HfConfig], ModelConfig]
    files: Naming
    """Names in the publisher's own files."""
    gguf: Naming | None = None
    """Names in GGUF files; None where llama.cpp does not have the family."""


FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        ("LlamaForCausalLM",),
        configs.llama,
        Naming(names.LLAMA, ignored=(".rotary_emb.inv_freq",)),
        names.GGUF_LLAMA,
    ),
    Family("mistral", ("MistralForCausalLM",), configs.mistral, Naming(names.LLAMA), names.GGUF_LLAMA),
    Family("qwen2", ("Qwen2ForCausalLM",), configs.qwen2, Naming(names.LLAMA), names.GGUF),
    Family("qwen3", ("Qwen3ForCausalLM",), configs.qwen3, Naming(names.LLAMA), names.GGUF),
    Family("phi3", ("Phi3ForCausalLM",), configs.phi3, Naming(names.PHI3), names.GGUF_PHI3),
    Family("olmo2", ("Olmo2ForCausalLM",), configs.olmo2, Naming(names.LLAMA | names.POST_NORMS), names.GGUF),
    Family(
        "gpt_neox",
        ("GPTNeoXForCausalLM",),
        configs.gpt_neox,
        Naming(names.GPT_NEOX, ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")),
        names.GGUF_FUSED_QKV,
    ),
    Family("gemma", ("GemmaForCausalLM",), configs.gemma, Naming(names.GEMMA), names.GGUF),
    Family("gemma2", ("Gemma2ForCausalLM",), configs.gemma2, Naming(names.GEMMA2), names.GGUF),
    Family("gemma3_text", ("Gemma3ForCausalLM",), configs.gemma3, Naming(names.GEMMA2), names.GGUF),
    Family("nanochat", ("NanoChatForCausalLM",), configs.nanochat, Naming(names.NANOCHAT)),
    Family(
        "gpt2",
        ("GPT2LMHeadModel", "GPT2Model"),
        configs.gpt2,
        Naming(names.GPT2, ("transformer.", ""), (".attn.bias", ".attn.masked_bias")),
        names.GGUF_FUSED_QKV,
    ),
    Family("nanogpt", ("NanoGPT",), configs.gpt2, Naming(names.NANOGPT, ("transformer.", ""), (".attn.bias",))),
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
    raise UnsupportedModelError(
        f"architecture {shown} is not supported; supported are {known}; others may export with --via optimum"
    )


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


def source_tensors(naming: Naming, config: ModelConfig, stored: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A publisher's tensors by gptedge's names. Raises CheckpointError naming any missing, misshapen or unused one."""
    used: set[str] = set()
    found: dict[str, Tensor] = {}
    missing: list[str] = []
    for name, shape in tensor_shapes(config).items():
        part, layer = part_of(naming, name)
        if not part.name:
            found[name] = _constant(shape, part.plus)
            continue
        stored_name = _find(naming, part.name.format(i=layer), stored)
        if stored_name is None:
            missing.append(naming.prefixes[0] + part.name.format(i=layer))
            continue
        used.add(stored_name)
        found[name] = _view(stored[stored_name], part, config, shape, f"{where}: {stored_name}")
    if missing:
        raise CheckpointError(f"{where} has no tensor {_listed(missing)}")
    spare = [
        n
        for n in stored
        if n not in used and not n.endswith(naming.ignored or ("\0",)) and not _is_tied_head(n, naming, config)
    ]
    if spare:
        raise CheckpointError(f"{where} has tensors that the model does not use: {_listed(sorted(spare))}")
    return found


def part_of(naming: Naming, name: str) -> tuple[Part, str]:
    pieces = name.split(".")
    layer = pieces[1] if pieces[0] == "blocks" else ""
    key = ".".join(["blocks", "{i}", *pieces[2:]]) if layer else name
    return naming.parts[key], layer


def _find(naming: Naming, name: str, stored: Mapping[str, Tensor]) -> str | None:
    return next((prefix + name for prefix in naming.prefixes if prefix + name in stored), None)


def _listed(names: list[str]) -> str:
    """All of a few names, or the first of many and how many more."""
    unique = list(dict.fromkeys(names))  # parts of one fused matrix are missed together
    more = len(unique) - _LISTED
    return ", ".join(unique[:_LISTED]) + (f" and {more} more" if more > 0 else "")


_LISTED = 6


def _constant(shape: tuple[int, ...], value: float) -> Tensor:
    return Tensor(shape, "F32", lambda: np.full(shape, value, np.float32))


_FUSED = (("q", "k", "v"), ("gate", "up"))


def span(rows: str, c: ModelConfig) -> tuple[int, int, int]:
    """Where a part lies in its fused matrix: (first row, rows, rows of the whole)."""
    sizes = {"q": c.q_size, "k": c.kv_size, "v": c.kv_size, "gate": c.n_ff, "up": c.n_ff}
    group = next(group for group in _FUSED if rows in group)
    before = group[: group.index(rows)]
    return sum(sizes[x] for x in before), sizes[rows], sum(sizes[x] for x in group)


def _view(tensor: Tensor, part: Part, c: ModelConfig, shape: tuple[int, ...], what: str) -> Tensor:
    first, count, total = span(part.rows, c) if part.rows else (0, shape[0], shape[0])
    full = (total, *shape[1:])
    expected = full[::-1] if part.transpose else full
    if tensor.shape != expected:
        raise CheckpointError(f"{what} has the shape {list(tensor.shape)}; config.json implies {list(expected)}")
    if part == Part(part.name):
        return tensor
    if part.paired:
        return _unpaired(tensor, shape, c.head_dim)
    if not part.transpose and not part.per_head:
        return _rows_of(tensor, first, shape, np.float32(part.plus))
    heads = c.n_head if part.per_head else 1

    def read() -> FloatArray:
        array = tensor.read()
        array = array.T if part.transpose else array
        each = array.reshape(heads, total // heads, *shape[1:])[:, first // heads : (first + count) // heads]
        rows = np.ascontiguousarray(each).reshape(shape)
        return rows + np.float32(part.plus) if part.plus else rows

    return Tensor(shape, tensor.dtype, read)


def _unpaired(tensor: Tensor, shape: tuple[int, ...], head_dim: int) -> Tensor:
    """Each head's rows from pairs side by side, (head_dim / 2, 2), to first halves and second halves."""

    def read() -> FloatArray:
        paired = tensor.read().reshape(-1, head_dim // 2, 2, *shape[1:])  # [H | K, E / 2, 2, …]
        return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(shape)

    return Tensor(shape, tensor.dtype, read)


def _rows_of(tensor: Tensor, first: int, shape: tuple[int, ...], plus: np.float32) -> Tensor:
    """Consecutive rows of a tensor, plus a number."""

    def read_rows(start: int, stop: int) -> FloatArray:
        start, stop = first + start, first + stop
        rows = tensor.read()[start:stop] if tensor.read_rows is None else tensor.read_rows(start, stop)
        return rows + plus if plus else rows

    return Tensor(shape, tensor.dtype, lambda: read_rows(0, shape[0]), read_rows)


def _is_tied_head(name: str, naming: Naming, config: ModelConfig) -> bool:
    return config.tie_embeddings and name.endswith(naming.parts["head.weight"].name)


# ---- writing: gptedge's own checkpoints are Llama's ----------------------------------------------------------------


def checkpoint_name(name: str) -> str:
    """The name Llama's checkpoints give to one of our tensors."""
    part, layer = part_of(FAMILIES[0].files, name)
    return part.name.format(i=layer)


_WRITTEN = (
    *("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_ff", "vocab_size", "context_length"),
    *("norm_eps", "rope_theta", "tie_embeddings", "activation", "qkv_bias", "out_bias", "mlp_bias"),
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
