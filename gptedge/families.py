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
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from gptedge import family_configs as configs
from gptedge.config import ModelConfig
from gptedge.errors import CheckpointError, UnsupportedModelError
from gptedge.family_configs import HfConfig
from gptedge.safetensors import FloatArray, Tensor


@dataclass(frozen=True)
class Part:
    """Where a tensor lies in the publisher's files."""

    name: str
    rows: str = ""
    """The part of a fused matrix's output rows: q, k or v of one qkv, gate or up of one; empty is all of them."""
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
    Family("llama", ("LlamaForCausalLM",), configs.llama, _LLAMA_PARTS, ignored=(".rotary_emb.inv_freq",)),
    Family("mistral", ("MistralForCausalLM",), configs.mistral, _LLAMA_PARTS),
    Family("qwen2", ("Qwen2ForCausalLM",), configs.qwen2, _LLAMA_PARTS),
    Family("qwen3", ("Qwen3ForCausalLM",), configs.qwen3, _LLAMA_PARTS),
    Family("phi3", ("Phi3ForCausalLM",), configs.phi3, _FUSED_LLAMA_PARTS),
    Family("olmo2", ("Olmo2ForCausalLM",), configs.olmo2, _LLAMA_PARTS | _POST_NORMS),
    Family(
        "gpt_neox",
        ("GPTNeoXForCausalLM",),
        configs.gpt_neox,
        _GPT_NEOX_PARTS,
        ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
    Family("gemma", ("GemmaForCausalLM",), configs.gemma, _GEMMA_PARTS),
    Family("gemma2", ("Gemma2ForCausalLM",), configs.gemma2, _GEMMA2_PARTS),
    Family("gemma3_text", ("Gemma3ForCausalLM",), configs.gemma3, _GEMMA2_PARTS),
    Family("nanochat", ("NanoChatForCausalLM",), configs.nanochat, _NANOCHAT_PARTS),
    Family(
        "gpt2",
        ("GPT2LMHeadModel", "GPT2Model"),
        configs.gpt2,
        _GPT2_PARTS,
        prefixes=("transformer.", ""),
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    Family(
        "nanogpt",
        ("NanoGPT",),
        configs.gpt2,
        _NANOGPT_PARTS,
        prefixes=("transformer.", ""),
        ignored=(".attn.bias",),
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


def _rows_of(tensor: Tensor, first: int, shape: tuple[int, ...], plus: np.float32) -> Tensor:
    """Consecutive rows of a tensor, plus a number."""

    def read_rows(start: int, stop: int) -> FloatArray:
        start, stop = first + start, first + stop
        rows = tensor.read()[start:stop] if tensor.read_rows is None else tensor.read_rows(start, stop)
        return rows + plus if plus else rows

    return Tensor(shape, tensor.dtype, lambda: read_rows(0, shape[0]), read_rows)


def _is_tied_head(name: str, config: ModelConfig) -> bool:
    return config.tie_embeddings and name.endswith(("lm_head.weight", "embed_out.weight"))


# ---- writing: gptedge's own checkpoints are Llama's ----------------------------------------------------------------


def checkpoint_name(name: str) -> str:
    """The name Llama's checkpoints give to one of our tensors."""
    part, layer = _part_of(FAMILIES[0], name)
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
