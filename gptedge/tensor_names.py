"""What publishers call a model's tensors: Hugging Face's classes, nanoGPT, and llama.cpp's GGUF files.

Each table maps gptedge's names (see `families`), with {i} for the layer, to a `Part` of what a file stores. Tables hold
more than any one model has: a bias, a norm or a head that a model lacks is never asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


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
    paired: bool = False
    """Dimensions that rotate together stand side by side in each head's rows, rather than half a head apart."""
    plus: float = 0.0
    """Added to what is stored; with no name, nothing is, and this is all."""


Parts = Mapping[str, Part]


@dataclass(frozen=True)
class Naming:
    """How one kind of file names a family's tensors."""

    parts: Parts
    prefixes: tuple[str, ...] = ("",)
    """Prefixes some publishers put before, or leave out of, every name."""
    ignored: tuple[str, ...] = ()
    """Endings of stored tensors that are not weights (buffers)."""


# ---- Hugging Face --------------------------------------------------------------------------------------------------


def _both(table: Mapping[str, Part]) -> dict[str, Part]:
    """Weights and biases of the same modules."""
    return {
        f"{ours}.{kind}": replace(part, name=f"{part.name}.{kind}")
        for kind in ("weight", "bias")
        for ours, part in table.items()
    }


LLAMA = _both(
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

PHI3 = LLAMA | _both(
    {
        **{f"blocks.{{i}}.attn.{x}": Part("model.layers.{i}.self_attn.qkv_proj", rows=x) for x in ("q", "k", "v")},
        **{f"blocks.{{i}}.mlp.{x}": Part("model.layers.{i}.mlp.gate_up_proj", rows=x) for x in ("gate", "up")},
    }
)

POST_NORMS = _both(
    {
        "blocks.{i}.attn_post_norm": Part("model.layers.{i}.post_attention_layernorm"),
        "blocks.{i}.mlp_post_norm": Part("model.layers.{i}.post_feedforward_layernorm"),
    }
)

_GAINS = [name for name in LLAMA | POST_NORMS if name.endswith("norm.weight")]


def _one_more(table: Mapping[str, Part]) -> dict[str, Part]:
    """Gemma's norms are stored as the gain less one."""
    return {ours: replace(part, plus=1.0) if ours in _GAINS else part for ours, part in table.items()}


GEMMA = _one_more(LLAMA)
GEMMA2 = _one_more(
    LLAMA | POST_NORMS | _both({"blocks.{i}.mlp_norm": Part("model.layers.{i}.pre_feedforward_layernorm")})
)

NANOCHAT = {
    **LLAMA,
    **dict.fromkeys(["embed_norm.weight", *_GAINS], Part("", plus=1.0)),
    **_both(
        {
            "blocks.{i}.mlp.up": Part("model.layers.{i}.mlp.fc1"),
            "blocks.{i}.mlp.down": Part("model.layers.{i}.mlp.fc2"),
        }
    ),
}

GPT_NEOX = _both(
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

GPT2 = _both(
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
NANOGPT = {ours: replace(part, transpose=False) for ours, part in GPT2.items()}


# ---- GGUF: the names of llama.cpp's converter, and what it does to the tensors ---------------------------------------

_GGUF_BUFFERS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "attn_rot_embd.weight")

_GGUF_LLAMA = _both(
    {
        "embed": Part("token_embd"),
        "blocks.{i}.attn_norm": Part("blk.{i}.attn_norm"),
        "blocks.{i}.attn.q": Part("blk.{i}.attn_q"),
        "blocks.{i}.attn.k": Part("blk.{i}.attn_k"),
        "blocks.{i}.attn.v": Part("blk.{i}.attn_v"),
        "blocks.{i}.attn.q_norm": Part("blk.{i}.attn_q_norm"),
        "blocks.{i}.attn.k_norm": Part("blk.{i}.attn_k_norm"),
        "blocks.{i}.attn.o": Part("blk.{i}.attn_output"),
        "blocks.{i}.attn_post_norm": Part("blk.{i}.post_attention_norm"),
        "blocks.{i}.mlp_norm": Part("blk.{i}.ffn_norm"),
        "blocks.{i}.mlp.gate": Part("blk.{i}.ffn_gate"),
        "blocks.{i}.mlp.up": Part("blk.{i}.ffn_up"),
        "blocks.{i}.mlp.down": Part("blk.{i}.ffn_down"),
        "blocks.{i}.mlp_post_norm": Part("blk.{i}.post_ffw_norm"),
        "norm": Part("output_norm"),
        "head": Part("output"),
    }
)
_GGUF_PAIRED = {
    ours: replace(part, paired=True)
    for ours, part in _GGUF_LLAMA.items()
    if ours.startswith(("blocks.{i}.attn.q.", "blocks.{i}.attn.k."))
}
_GGUF_QKV = {f"blocks.{{i}}.attn.{x}": Part("blk.{i}.attn_qkv", rows=x) for x in ("q", "k", "v")}

GGUF_LLAMA = Naming(_GGUF_LLAMA | _GGUF_PAIRED, ignored=_GGUF_BUFFERS)
GGUF = Naming(_GGUF_LLAMA, ignored=_GGUF_BUFFERS)
"""Where nothing is rearranged. Gemma's gains have the one added already."""
GGUF_FUSED_QKV = Naming(_GGUF_LLAMA | _both(_GGUF_QKV | {"position": Part("position_embd")}), ignored=_GGUF_BUFFERS)
GGUF_PHI3 = Naming(
    _GGUF_LLAMA | _both(_GGUF_QKV | {f"blocks.{{i}}.mlp.{x}": Part("blk.{i}.ffn_up", rows=x) for x in ("gate", "up")}),
    ignored=_GGUF_BUFFERS,
)
