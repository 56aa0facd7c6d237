"""GGUF files: written by the `gguf` package's writer, read by ours, compared with what went in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gptedge.errors import CheckpointError, UnsupportedModelError
from gptedge.export.sources import gguf_container
from gptedge.export.sources.gguf_file import open_gguf
from gptedge.families import checkpoint_name
from tests.export.gguf_files import (
    FF,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    WIDTH,
    Arrays,
    Q,
    bare,
    hf_weights,
    llama_keys,
    save,
    tiny_llama,
    to_gguf,
)

TEXT = "The quick brown fox's 12345 jumps over 67 lazy dogs; été 東京!\n\n  x = y_1 + 3.14\r\n\tWE'RE done…  "

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
