"""GGUF files: written by the `gguf` package's writer, read by ours, compared with what went in."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Regex as TokenizersRegex
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gptedge.errors import CheckpointError, GptEdgeError, UnsupportedModelError
from gptedge.export.sources import gguf_container, open_source
from gptedge.export.sources.gguf_file import open_gguf
from gptedge.export.sources.gguf_tokenizer import read_tokenizer
from gptedge.families import checkpoint_name

Q = gguf.GGMLQuantizationType
Arrays = dict[str, np.ndarray]

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FF = 2, 24, 3, 1, 8, 40
TEXT = "The quick brown fox's 12345 jumps over 67 lazy dogs; été 東京!\n\n  x = y_1 + 3.14\r\n\tWE'RE done…  "


# ---- writing -------------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arrays]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, tiny_llama(path)


# ---- what comes out ------------------------------------------------------------------------------------------------


def test_llama_weights_come_back_exactly(llama: tuple[Path, Arrays]) -> None:
    path, weights = llama
    checkpoint = open_gguf(path)
    got = {checkpoint_name(name): tensor for name, tensor in checkpoint.weights().items()}
    assert set(got) == set(weights)
    for name, array in weights.items():
        assert got[name].shape == array.shape
        np.testing.assert_array_equal(got[name].read(), array, err_msg=name)


def test_llama_config(llama: tuple[Path, Arrays]) -> None:
    checkpoint = open_gguf(llama[0])
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 261,
        "hidden_size": WIDTH,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "partial_rotary_factor": 1.0,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 258,
        "eos_token_id": 259,
        "torch_dtype": "float32",
    }
    assert checkpoint.hf_config == expected
    assert checkpoint.config.n_kv_head == KV_HEADS


def test_untied_head(tmp_path: Path) -> None:
    weights = tiny_llama(tmp_path / "m.gguf", tied=False)
    checkpoint = open_gguf(tmp_path / "m.gguf")
    assert checkpoint.hf_config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(checkpoint.weights()["head.weight"].read(), weights["lm_head.weight"])


def test_qwen2_is_not_interleaved_and_has_biases(tmp_path: Path) -> None:
    weights = hf_weights(np.random.default_rng(1), 17, bias=True)
    path = bare(tmp_path / "q.gguf", "qwen2", llama_keys, to_gguf(weights, rotated=False))
    checkpoint = open_gguf(path)
    assert checkpoint.family.name == "qwen2"
    assert checkpoint.hf_config["vocab_size"] == 17
    assert checkpoint.side_files == {}
    for name in ("q_proj.weight", "k_proj.weight", "q_proj.bias"):
        ours = f"blocks.1.attn.{name.replace('_proj', '')}"
        np.testing.assert_array_equal(checkpoint.weights()[ours].read(), weights[f"model.layers.1.self_attn.{name}"])
    assert "blocks.0.attn.q.bias" in checkpoint.weights()


def test_qwen3_has_norms_and_its_own_head_size(tmp_path: Path) -> None:
    weights = hf_weights(np.random.default_rng(2), 17)
    for i in range(LAYERS):
        for x in "qk":
            weights[f"model.layers.{i}.self_attn.{x}_norm.weight"] = np.full(16, 1 + i, np.float32)
        rows = {"q_proj": 48, "k_proj": 16, "v_proj": 16}
        for x, n in rows.items():
            weights[f"model.layers.{i}.self_attn.{x}.weight"] = np.ones((n, WIDTH), np.float32)
        weights[f"model.layers.{i}.self_attn.o_proj.weight"] = np.ones((WIDTH, 48), np.float32)

    def keys(w: gguf.GGUFWriter) -> None:
        llama_keys(w)
        w.add_key_length(16)
        w.add_value_length(16)

    checkpoint = open_gguf(bare(tmp_path / "q.gguf", "qwen3", keys, to_gguf(weights, rotated=False)))
    assert checkpoint.config.head_dim == 16
    assert checkpoint.config.qk_norm
    assert checkpoint.weights()["blocks.1.attn.k_norm.weight"].read().tolist() == [2.0] * 16


def test_gpt2_matrices_are_transposed(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    linear = {
        "attn_qkv": (3 * WIDTH, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_up": (96, WIDTH),
        "ffn_down": (WIDTH, 96),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (17, WIDTH), "position_embd.weight": (64, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{n}.weight": s for n, s in linear.items()}
        shapes |= {f"blk.{i}.{n}.bias": s[:1] for n, s in linear.items()}
        shapes |= {f"blk.{i}.{n}.{k}": (WIDTH,) for n in ("attn_norm", "ffn_norm") for k in ("weight", "bias")}
    shapes |= {f"output_norm.{k}": (WIDTH,) for k in ("weight", "bias")}
    stored = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def keys(w: gguf.GGUFWriter) -> None:
        w.add_context_length(64)
        w.add_embedding_length(WIDTH)
        w.add_block_count(LAYERS)
        w.add_feed_forward_length(96)
        w.add_head_count(HEADS)
        w.add_layer_norm_eps(1e-5)

    checkpoint = open_gguf(bare(tmp_path / "g.gguf", "gpt2", keys, stored))
    ours = checkpoint.weights()
    np.testing.assert_array_equal(
        ours["blocks.1.attn.k.weight"].read(), stored["blk.1.attn_qkv.weight"][WIDTH : 2 * WIDTH]
    )
    np.testing.assert_array_equal(ours["blocks.0.mlp.down.weight"].read(), stored["blk.0.ffn_down.weight"])
    assert checkpoint.config.activation == "gelu_tanh"


QUANTIZED = [
    Q.F32,
    Q.F16,
    Q.BF16,
    Q.Q8_0,
    Q.Q4_0,
    Q.Q4_1,
    Q.Q5_0,
    Q.Q5_1,
    Q.Q4_K,
    Q.Q5_K,
    Q.Q6_K,
    Q.Q2_K,
    Q.Q3_K,
    Q.IQ4_XS,
]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda k: k.name)
@pytest.mark.parametrize("rows", [1, 2050])  # the second is read in two pieces
def test_every_kind_dequantizes_as_the_gguf_package_does(tmp_path: Path, kind: Q, rows: int) -> None:
    width = 256
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 0x3c: no half-precision scale among them is infinite.
    raw = np.random.default_rng(4).integers(0, 0x3C, (rows, width // block * size), np.uint8)
    w = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    w.add_tensor("first", np.ones(3, np.float32))
    w.add_tensor("x", raw, raw_dtype=kind)
    save(w)
    tensor = gguf_container.read(tmp_path / "q.gguf").tensors["x"]
    assert (tensor.shape, tensor.dtype) == ((rows, width), kind.name)
    got = tensor.read()
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, gguf.quants.dequantize(raw, kind))


def test_quantized_weights_are_near_what_was_quantized(tmp_path: Path) -> None:
    array = np.random.default_rng(5).standard_normal((6, 64)).astype(np.float32)
    w = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    w.add_tensor("x", gguf.quants.quantize(array, Q.Q8_0), raw_dtype=Q.Q8_0)
    save(w)
    got = gguf_container.read(tmp_path / "q.gguf").tensors["x"].read()
    assert 0 < np.abs(got - array).max() < 0.02


def test_metadata_kinds(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    w.add_uint8("u8", 255)
    w.add_int8("i8", -128)
    w.add_uint16("u16", 65535)
    w.add_int16("i16", -1)
    w.add_int32("i32", -(2**31))
    w.add_uint64("u64", 2**64 - 1)
    w.add_int64("i64", -1)
    w.add_float64("f64", 0.1)
    w.add_float32("f32", 0.1)
    w.add_bool("yes", True)
    w.add_array("numbers", [1, 2, 3])
    w.add_array("strings", ["", "ü", "東京"])
    save(w)
    metadata = gguf_container.read(tmp_path / "m.gguf").metadata
    assert metadata == {
        "general.architecture": "llama",
        "u8": 255,
        "i8": -128,
        "u16": 65535,
        "i16": -1,
        "i32": -(2**31),
        "u64": 2**64 - 1,
        "i64": -1,
        "f64": 0.1,
        "f32": 0.1,  # not 0.10000000149011612
        "yes": True,
        "numbers": [1, 2, 3],
        "strings": ["", "ü", "東京"],
    }


def test_another_alignment(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    w.add_custom_alignment(256)
    w.add_tensor("a", np.arange(3, dtype=np.float32))
    w.add_tensor("b", np.arange(5, dtype=np.float32))
    save(w)
    assert gguf_container.read(tmp_path / "m.gguf").tensors["b"].read().tolist() == [0, 1, 2, 3, 4]


# ---- rotary scaling ------------------------------------------------------------------------------------------------


def test_linear_scaling(tmp_path: Path) -> None:
    def keys(w: gguf.GGUFWriter) -> None:
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(4.0)

    tiny_llama(tmp_path / "m.gguf", keys=keys)
    scaling = open_gguf(tmp_path / "m.gguf").config.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


def llama3_factors(factor: float, head_dim: int, theta: float) -> np.ndarray:
    """Divisors of the frequencies as Llama 3.1 was published: 1 below, `factor` above, blended between."""
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192 / 1:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def with_factors(path: Path, factors: np.ndarray) -> Path:
    def keys(w: gguf.GGUFWriter) -> None:
        w.add_tensor("rope_freqs.weight", factors)

    tiny_llama(path, keys=keys)
    return path


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised(tmp_path: Path, factor: float) -> None:
    path = with_factors(tmp_path / "m.gguf", llama3_factors(factor, HEAD_DIM, 50000.0))
    checkpoint = open_gguf(path)
    assert checkpoint.hf_config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert len(checkpoint.weights()) == len(checkpoint.tensors) - 1


def test_rotary_factors_of_one_are_no_scaling(tmp_path: Path) -> None:
    path = with_factors(tmp_path / "m.gguf", np.ones(HEAD_DIM // 2, np.float32))
    assert open_gguf(path).hf_config["rope_scaling"] is None


@pytest.mark.parametrize("factors", [[1.0, 2.0, 3.0, 8.0], [8.0] * 4, [1.0, 1.0]])
def test_other_rotary_factors_are_refused(tmp_path: Path, factors: list[float]) -> None:
    path = with_factors(tmp_path / "m.gguf", np.array(factors, np.float32))
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        open_gguf(path)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_unknown_architecture(tmp_path: Path) -> None:
    path = bare(tmp_path / "m.gguf", "mamba", llama_keys, {})
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama"):
        open_gguf(path)


REFUSED = [
    ("llama.expert_count", lambda w, k: w.add_uint32(k, 8)),
    ("llama.attention.scale", lambda w, k: w.add_float32(k, 0.5)),
    ("partial_rotary_factor", lambda w, k: w.add_rope_dimension_count(4)),
    ("llama.attention.value_length", lambda w, k: w.add_uint32(k, 4)),
    ("llama.final_logit_softcapping", lambda w, k: w.add_float32(k, 30.0)),
]


@pytest.mark.parametrize(("key", "add"), REFUSED, ids=[k for k, _ in REFUSED])
def test_features_that_change_the_model(tmp_path: Path, key: str, add: Callable[[Any, str], None]) -> None:
    tiny_llama(tmp_path / "m.gguf", keys=lambda w: add(w, key))
    with pytest.raises(UnsupportedModelError, match=key):
        _ = open_gguf(tmp_path / "m.gguf").config


def test_split_files(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m.gguf", keys=lambda w: w.add_uint16("split.count", 3))
    with pytest.raises(UnsupportedModelError, match="3 split files"):
        open_gguf(tmp_path / "m.gguf")


def test_a_tensor_that_the_architecture_does_not_have(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m.gguf", keys=lambda w: w.add_tensor("blk.0.attn_sinks.weight", np.ones(3, np.float32)))
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_sinks\.weight"):
        open_gguf(tmp_path / "m.gguf").weights()


def test_layers_that_differ(tmp_path: Path) -> None:
    def keys(w: gguf.GGUFWriter) -> None:
        llama_keys(w)
        w.kv_data[0].pop("llama.feed_forward_length")
        w.add_feed_forward_length([FF, FF + 8])

    path = bare(tmp_path / "m.gguf", "llama", keys, to_gguf(hf_weights(np.random.default_rng(0), 9)))
    with pytest.raises(UnsupportedModelError, match="layer to layer"):
        open_gguf(path)


def test_missing_key(tmp_path: Path) -> None:
    def keys(w: gguf.GGUFWriter) -> None:
        llama_keys(w)
        w.kv_data[0].pop("llama.block_count")

    path = bare(tmp_path / "m.gguf", "llama", keys, to_gguf(hf_weights(np.random.default_rng(0), 9)))
    with pytest.raises(CheckpointError, match=r"llama\.block_count"):
        open_gguf(path)


def test_a_type_without_a_dequantizer(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m.gguf", keys=lambda w: w.add_tensor("output.weight", np.ones((261, WIDTH), np.int8)))
    with pytest.raises(UnsupportedModelError, match="I8"):
        open_gguf(tmp_path / "m.gguf")


# ---- damaged files -------------------------------------------------------------------------------------------------


def assert_refused(path: Path, kind: type[GptEdgeError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_cut_anywhere(llama: tuple[Path, Arrays], tmp_path: Path) -> None:
    """In the magic, the header, the metadata, the tensor table and the data, up to the last byte of the last tensor."""
    whole = llama[0].read_bytes()
    reader = gguf.GGUFReader(llama[0])
    end = max(t.data_offset + t.n_bytes for t in reader.tensors)
    table = reader.tensors[0].field.offset
    places = {
        0,
        1,
        3,
        4,
        7,
        8,
        15,
        16,
        23,
        24,
        table,
        table + 5,
        reader.data_offset,
        reader.data_offset + 1,
        end // 2,
        end - 1,
    }
    places |= set(range(24, end - 1, max(1, end // 300)))
    path = tmp_path / "cut.gguf"
    for place in sorted(places):
        path.write_bytes(whole[:place])
        assert "cut short" in assert_refused(path), place
    path.write_bytes(whole[:end])  # only padding is gone
    open_gguf(path)


def test_any_damaged_byte_gives_one_line_or_a_model(llama: tuple[Path, Arrays], tmp_path: Path) -> None:
    """Random damage before the data never ends in another exception, nor in an allocation beyond the file's size."""
    whole = llama[0].read_bytes()
    head = gguf.GGUFReader(llama[0]).data_offset
    rng = random.Random(6)
    path = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 8))):
            damaged[rng.choice((rng.randrange(head), rng.randrange(600)))] = rng.choice(
                (0, 1, 0x7F, 0xFF, rng.randrange(256))
            )
        path.write_bytes(damaged)
        try:
            for tensor in open_gguf(path).weights().values():
                tensor.read()
        except GptEdgeError as e:
            refused += 1
            assert "\n" not in str(e)  # noqa: PT017
    assert refused > 100


def patched(source: Path, path: Path, old: bytes, new: bytes) -> Path:
    content = source.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


def test_overlapping_tensors(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    w.add_tensor("a", np.ones(8, np.float32))
    w.add_tensor("bbbb", np.ones(8, np.float32))
    save(w)
    entry = struct.pack("<Q4sIQI", 4, b"bbbb", 1, 8, 0)
    path = patched(
        tmp_path / "m.gguf", tmp_path / "n.gguf", entry + struct.pack("<Q", 32), entry + struct.pack("<Q", 0)
    )
    assert "tensors a and bbbb overlap" in assert_refused(path)


def test_absurd_counts(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for counts in ((2**63, 0), (0, 2**63)):
        path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, *counts))
        assert "cut short" in assert_refused(path)
    key = struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 2**61)  # an array of 2**61 numbers
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key)
    assert "cut short" in assert_refused(path)


def test_arrays_nested_without_end(tmp_path: Path) -> None:
    nested = struct.pack("<Q1sI", 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 5000
    (tmp_path / "m.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + nested)
    assert_refused(tmp_path / "m.gguf")


@pytest.mark.parametrize(("version", "word"), [(1, "version 1"), (3 << 24, "big-endian")])
def test_other_versions(tmp_path: Path, version: int, word: str) -> None:
    (tmp_path / "m.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", version, 0, 0))
    assert word in assert_refused(tmp_path / "m.gguf")


def test_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"<!DOCTYPE html>" * 100)
    assert "not a GGUF file" in assert_refused(tmp_path / "m.gguf")


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def trained(pre: Any, normalizer: Any = None) -> Tokenizer:
    """A byte-level BPE of a few hundred tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=byte_alphabet(), special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT * 3, "then they gather there"] * 3, trainer)
    return tokenizer


def metadata_of(tokenizer: Tokenizer, name: str | None, /, **more: Any) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t == "<|end|>" else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    metadata |= {"tokenizer.ggml.pre": name} if name else {}
    return metadata | {f"tokenizer.ggml.{k}": v for k, v in more.items()}


def rebuilt(metadata: dict[str, Any]) -> Tokenizer:
    made = read_tokenizer(Path("x.gguf"), metadata)
    assert made is not None
    return Tokenizer.from_str(json.dumps(made.tokenizer_json))


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(TokenizersRegex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PUBLISHED = {
    "gpt-2": (BYTE_LEVEL, None),
    "default": (BYTE_LEVEL, None),
    None: (BYTE_LEVEL, None),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTE_LEVEL]), None),
    "olmo": (BYTE_LEVEL, normalizers.NFC()),
    "dbrx": (split(WORDS % r"\p{N}{1,3}"), None),
    "llama-bpe": (split(WORDS % r"\p{N}{1,3}"), None),
    "qwen2": (split(WORDS % r"\p{N}"), normalizers.NFC()),
}


@pytest.mark.parametrize("pre", PUBLISHED, ids=str)
def test_byte_level_tokenizers_are_the_published_ones(pre: str | None) -> None:
    published = trained(*PUBLISHED[pre])
    ours = rebuilt(metadata_of(published, pre, add_bos_token=False))
    for text in (TEXT, "123456 1 22 333", "e\u0301te\u0301", "don't DON'T", "a<|end|>b", "  \n \n x", "\u2167 ½"):
        assert ours.encode(text).ids == published.encode(text).ids, text
        assert ours.pre_tokenizer.pre_tokenize_str(text) == published.pre_tokenizer.pre_tokenize_str(text)
        assert ours.decode(ours.encode(text).ids) == published.decode(published.encode(text).ids)


def test_published_patterns_differ_on_these_texts() -> None:
    """The test above can tell them apart."""
    made = trained(BYTE_LEVEL)
    splits = {
        pre: str(rebuilt(metadata_of(made, pre)).pre_tokenizer.pre_tokenize_str(TEXT)) for pre in PUBLISHED if pre
    }
    assert len(set(splits.values())) == len(splits) - 3  # default and olmo are as gpt-2, dbrx as llama-bpe


def test_llama3_takes_whole_tokens_before_merges() -> None:
    made = trained(*PUBLISHED["llama-bpe"])
    metadata = metadata_of(made, "llama-bpe", add_bos_token=False)
    metadata["tokenizer.ggml.tokens"].append("Ġgathering")
    metadata["tokenizer.ggml.token_type"].append(1)
    assert rebuilt(metadata).encode(" gathering").tokens == ["Ġgathering"]


def test_beginning_token_is_added_when_the_file_says_so() -> None:
    made = trained(*PUBLISHED["llama-bpe"])
    plain = made.encode("they").ids
    assert rebuilt(metadata_of(made, "llama-bpe")).encode("they").ids == [0, *plain]  # llama.cpp's default for it
    assert rebuilt(metadata_of(made, "llama-bpe", add_bos_token=False)).encode("they").ids == plain
    assert rebuilt(metadata_of(made, "gpt-2")).encode("they").ids == plain
    both = rebuilt(metadata_of(made, "gpt-2", add_bos_token=True, add_eos_token=True))
    assert both.encode("they").ids == [0, *plain, 0]
    assert both.encode("they", add_special_tokens=False).ids == plain


def test_kinds_of_tokens(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    llama_keys(w)
    vocab = byte_tokens(w, [("<s>", 3), ("<tool>", 4), ("[PAD260]", 5)])
    for name, array in to_gguf(hf_weights(np.random.default_rng(0), vocab)).items():
        w.add_tensor(name, array)
    save(w)
    checkpoint = open_gguf(tmp_path / "m.gguf")
    tokenizer = json.loads(checkpoint.side_files["tokenizer.json"])
    added = {t["content"]: (t["id"], t["special"]) for t in tokenizer["added_tokens"]}
    assert added == {"<s>": (258, True), "<tool>": (259, False)}
    assert "[PAD260]" not in tokenizer["model"]["vocab"]
    assert checkpoint.hf_config["vocab_size"] == vocab == 261
    made = Tokenizer.from_str(checkpoint.side_files["tokenizer.json"].decode())
    assert made.encode("a<tool>the<s>").tokens == ["a", "<tool>", "the", "<s>"]
    assert made.decode(made.encode("a<tool>the<s>").ids) == "a<tool>the"


def test_side_files(llama: tuple[Path, Arrays]) -> None:
    files = open_gguf(llama[0]).side_files
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert json.loads(files["tokenizer_config.json"]) == {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_prefix_space": False,
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ messages[0]['content'] }}",
    }
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 258, "eos_token_id": 259}
    assert files["chat_template.jinja"] == b"{{ messages[0]['content'] }}"


def test_end_of_turn_stops_generation_too(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m.gguf", keys=lambda w: w.add_eot_token_id(260))
    checkpoint = open_gguf(tmp_path / "m.gguf")
    assert json.loads(checkpoint.side_files["generation_config.json"])["eos_token_id"] == [259, 260]
    assert checkpoint.hf_config["eos_token_id"] == 259


@pytest.mark.parametrize(
    ("change", "kind", "word"),
    [
        ({"pre": "tekken"}, UnsupportedModelError, "'tekken'"),
        ({"model": "bert"}, UnsupportedModelError, "'bert'"),
        ({"token_type": [1, 2]}, CheckpointError, "token_type"),
        ({"tokens": "x"}, CheckpointError, "tokens"),
        ({"merges": ["a b c"]}, CheckpointError, "'a b c'"),
        ({"eos_token_id": 9999}, CheckpointError, "9999"),
        ({"model": "llama"}, CheckpointError, "scores"),
    ],
)
def test_tokenizers_that_are_refused(change: dict[str, Any], kind: type[Exception], word: str) -> None:
    metadata = metadata_of(trained(BYTE_LEVEL), None, **change)
    with pytest.raises(kind, match=word):
        read_tokenizer(Path("x.gguf"), metadata)


# ---- SentencePiece -------------------------------------------------------------------------------------------------


def spm_metadata(pieces: list[str], scores: list[float], **more: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "scores": [0.0] * 259 + scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items()}


def spm_encode(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's own rule, slowly: join the neighbours with the best score, leftmost first, while any can be."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            return symbols
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def test_sentencepiece_is_exact() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        alphabet = "▁abc"[: 3 + seed % 2]
        pieces = sorted({"".join(rng.choices(alphabet, k=rng.randint(2, 6))) for _ in range(25)} - set(alphabet))
        rng.shuffle(pieces)
        pieces += alphabet
        scores = {p: -float(i) for i, p in enumerate(pieces)}
        tokenizer = rebuilt(spm_metadata(pieces, list(scores.values()), add_bos_token=False))
        for _ in range(20):
            text = "".join(rng.choices(alphabet.replace("▁", " "), k=rng.randint(1, 30)))
            assert tokenizer.encode(text).tokens == spm_encode(text, scores), text
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentencepiece_bytes_and_special_tokens() -> None:
    tokenizer = rebuilt(spm_metadata(["▁a", "▁", "a"], [-0.0, -1.0, -2.0]))
    encoded = tokenizer.encode("a é</s>")
    assert encoded.tokens == ["<s>", "▁a", "▁", "<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.decode(encoded.ids) == "a é"


def test_sentencepiece_with_equal_scores_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="one score"):
        rebuilt(spm_metadata(["ab", "ba", "a", "b"], [-1.0, -1.0, -2.0, -3.0]))


def test_source_is_recognised_by_its_magic(llama: tuple[Path, Arrays], tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(llama[0].read_bytes())
    assert open_source(tmp_path / "model.bin").family.name == "llama"
