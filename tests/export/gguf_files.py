"""Little GGUF files, written by the gguf package, and what they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

Q = gguf.GGMLQuantizationType
Arrays = dict[str, np.ndarray]

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FF = 2, 24, 3, 1, 8, 40


def byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def hf_weights(rng: np.random.Generator, vocab: int, *, tied: bool = True, bias: bool = False) -> Arrays:
    """A tiny Llama by Hugging Face's names."""
    kv = KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (WIDTH,),
            p + "self_attn.q_proj.weight": (WIDTH, WIDTH),
            p + "self_attn.k_proj.weight": (kv, WIDTH),
            p + "self_attn.v_proj.weight": (kv, WIDTH),
            p + "self_attn.o_proj.weight": (WIDTH, WIDTH),
            p + "post_attention_layernorm.weight": (WIDTH,),
            p + "mlp.gate_proj.weight": (FF, WIDTH),
            p + "mlp.up_proj.weight": (FF, WIDTH),
            p + "mlp.down_proj.weight": (WIDTH, FF),
        }
        if bias:
            shapes |= {p + "self_attn.q_proj.bias": (WIDTH,)}
            shapes |= {p + f"self_attn.{x}_proj.bias": (kv,) for x in "kv"}
    if not tied:
        shapes["lm_head.weight"] = (vocab, WIDTH)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k: row (half h, pair j) of a head moves to 2 j + h."""
    half = array.shape[0] // heads // 2
    order = [head * 2 * half + h * half + j for head in range(heads) for j in range(half) for h in range(2)]
    return array[order]


def to_gguf(weights: Arrays, *, rotated: bool = True) -> Arrays:
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}
    out = {}
    for name, array in weights.items():
        module = name.split(".")[-2]
        out[gguf_name(name)] = interleave(array, heads[module]) if rotated and module in heads else array
    return out


def llama_keys(w: gguf.GGUFWriter) -> None:
    w.add_context_length(64)
    w.add_embedding_length(WIDTH)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(FF)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(50000.0)


def byte_tokens(w: gguf.GGUFWriter, extra: list[tuple[str, int]] | None = None, pre: str | None = "smollm") -> int:
    """A vocabulary of the 256 bytes, two merges and some extra tokens; returns its size."""
    tokens = [(t, 1) for t in [*byte_alphabet(), "th", "the"]]
    tokens += extra if extra is not None else [("<s>", 3), ("</s>", 3), ("<tool>", 4)]
    w.add_tokenizer_model("gpt2")
    if pre is not None:
        w.add_tokenizer_pre(pre)
    w.add_token_list([t for t, _ in tokens])
    w.add_token_types([k for _, k in tokens])
    w.add_token_merges(["t h", "th e"])
    return len(tokens)


def save(w: gguf.GGUFWriter) -> None:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def tiny_llama(path: Path, *, tied: bool = True, keys: Callable[[gguf.GGUFWriter], None] | None = None) -> Arrays:
    """A whole little file, and the Hugging Face weights that it holds."""
    w = gguf.GGUFWriter(path, "llama")
    llama_keys(w)
    vocab = byte_tokens(w)
    w.add_bos_token_id(vocab - 3)
    w.add_eos_token_id(vocab - 2)
    w.add_chat_template("{{ messages[0]['content'] }}")
    if keys:
        keys(w)
    weights = hf_weights(np.random.default_rng(0), vocab, tied=tied)
    for name, array in to_gguf(weights).items():
        w.add_tensor(name, array)
    save(w)
    return weights


def bare(path: Path, architecture: str, keys: Callable[[gguf.GGUFWriter], None], tensors: Arrays) -> Path:
    """A file without a tokenizer."""
    w = gguf.GGUFWriter(path, architecture)
    keys(w)
    for name, array in tensors.items():
        w.add_tensor(name, array)
    save(w)
    return path
