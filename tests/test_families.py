"""The table of families: what is refused by name, and what a config.json's options become."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptedge.config import ModelConfig, rope_frequencies
from gptedge.errors import CheckpointError, UnsupportedModelError, UsageError
from gptedge.families import FAMILIES, family_of, hf_config, tensor_shapes

SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 150,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 347,
    "max_position_embeddings": 200,
}
YARN = {"rope_type": "yarn", "factor": 4.0}
DYNAMIC = {"type": "dynamic", "factor": 2.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}


def config_of(architecture: str, **changes: Any) -> ModelConfig:
    config = {"architectures": [architecture], "model_type": architecture, **SHAPE, **changes}
    return family_of(config).config(config)


# name of the option that the message must hold -> (architecture, settings)
REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("attention_chunk_size", "LlamaForCausalLM", {"attention_chunk_size": 64}),
    ("clip_qkv", "Olmo2ForCausalLM", {"clip_qkv": 8.0}),
    ("logit_scale", "LlamaForCausalLM", {"logit_scale": 0.5}),
    ("use_parallel_residual", "LlamaForCausalLM", {"use_parallel_residual": True}),
    ("partial_rotary_factor", "LlamaForCausalLM", {"partial_rotary_factor": 0.5}),
    ("partial_rotary_factor", "MistralForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("partial_rotary_factor", "NanoChatForCausalLM", {"partial_rotary_factor": 0.5}),
    ("sliding_window", "LlamaForCausalLM", {"sliding_window": 64}),
    ("sliding_window", "Olmo2ForCausalLM", {"sliding_window": 64}),
    ("layer_types", "LlamaForCausalLM", {"layer_types": ["chunked_attention"] * 4}),
    ("layer_types", "MistralForCausalLM", {"sliding_window": 64, "layer_types": ["full_attention"] * 4}),
    ("layer_types", "Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 4}),
    ("layer_types", "Qwen3ForCausalLM", {"layer_types": ["linear_attention"] * 4}),
    ("layer_types", "Gemma3ForCausalLM", {"layer_types": ["full_attention"] * 3}),
    ("layer_types", "Gemma3ForCausalLM", {"sliding_window": None}),
    ("attention_bias", "MistralForCausalLM", {"attention_bias": True}),
    ("attention_bias", "Phi3ForCausalLM", {"attention_bias": True}),
    ("mlp_bias", "Olmo2ForCausalLM", {"mlp_bias": True}),
    ("final_logit_softcapping", "LlamaForCausalLM", {"final_logit_softcapping": 30.0}),
    ("attn_logit_softcapping", "Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}),
    ("use_bidirectional_attention", "Gemma3ForCausalLM", {"use_bidirectional_attention": True}),
    ("use_bidirectional_attention", "GemmaForCausalLM", {"use_bidirectional_attention": True}),
    ("rope_parameters", "Gemma3ForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    ("sliding_attention", "Gemma3ForCausalLM", {"rope_parameters": {"sliding_attention": LINEAR}}),
    ("yarn", "Gemma3ForCausalLM", {"rope_parameters": {"sliding_attention": YARN}}),
    ("dynamic", "Gemma3ForCausalLM", {"rope_parameters": {"full_attention": DYNAMIC}}),
    ("dynamic", "LlamaForCausalLM", {"rope_scaling": DYNAMIC}),
    ("dynamic", "GPTNeoXForCausalLM", {"rope_scaling": DYNAMIC}),
    ("'mrope'", "Qwen2ForCausalLM", {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}),
    ("proportional", "Qwen3ForCausalLM", {"rope_parameters": {"rope_type": "proportional"}}),
    ("'quick_gelu'", "GPTNeoXForCausalLM", {"hidden_act": "quick_gelu"}),
    ("Gemma3ForConditionalGeneration", "Gemma3ForConditionalGeneration", {}),
]


@pytest.mark.parametrize(("word", "architecture", "changes"), REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(word: str, architecture: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        config_of(architecture, **changes)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {"sliding_window": 200, "layer_types": ["full_attention"] * 4, "logit_scale": 1.0}),
        ("LlamaForCausalLM", {"sliding_window": 64, "use_sliding_window": False, "clip_qkv": None}),
        ("MistralForCausalLM", {"sliding_window": 200, "attention_bias": False, "mlp_bias": False}),
        ("MistralForCausalLM", {"sliding_window": None}),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 0}),
        ("Qwen3ForCausalLM", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 4}),
        ("Phi3ForCausalLM", {"sliding_window": 200, "partial_rotary_factor": 1.0, "attention_bias": False}),
    ],
)
def test_options_that_change_nothing_are_no_obstacle(architecture: str, changes: dict[str, Any]) -> None:
    config = config_of(architecture, **changes)
    assert (config.windows, config.rotary_dim) == ((), None)


def test_windows() -> None:
    long = {"max_position_embeddings": 8192}
    assert config_of("MistralForCausalLM", **long).windows == (4096,) * 4
    assert config_of("MistralForCausalLM", sliding_window=9).windows == (9,) * 4
    assert config_of("Phi3ForCausalLM", sliding_window=9).windows == (9,) * 4
    assert config_of("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=9, max_window_layers=3).windows == (
        0,
        0,
        0,
        9,
    )
    stated = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    given = config_of("Qwen3ForCausalLM", use_sliding_window=True, sliding_window=9, layer_types=stated)
    assert given.windows == (0, 9, 0, 9)
    assert config_of("Gemma2ForCausalLM", sliding_window=9).windows == (9, 0, 9, 0)
    assert config_of("Gemma3ForCausalLM", sliding_window=9, layer_types=stated).windows == (0, 9, 0, 9)
    assert config_of("Gemma3ForCausalLM", **long, sliding_window_pattern=3).windows == (4096, 4096, 0, 4096)


def test_gemma3_rope_in_the_older_format() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = config_of("Gemma3ForCausalLM", rope_theta=2e6, rope_local_base_freq=5e3, rope_scaling=scaling)
    assert (config.rope_theta, config.local_rope_theta) == (2e6, 5e3)
    assert config.rope_scaling is not None
    assert (config.rope_of(0).rope_theta, config.rope_of(0).rope_scaling) == (5e3, None)
    everywhere = config_of("Gemma3ForCausalLM", layer_types=["full_attention"] * 4, rope_theta=2e6)
    assert everywhere.rope_of(0).rope_theta == 2e6
    silent = config_of("Gemma3ForCausalLM")
    assert (silent.rope_theta, silent.local_rope_theta) == (1e6, 1e4)


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 100,
    },
    "yarn": YARN,
    "yarn of published Qwen": {**YARN, "original_max_position_embeddings": 50},
    "yarn, factor of one": {"rope_type": "yarn", "factor": 1.0},
    "yarn, no factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 40},
    "yarn, every number": {
        "rope_type": "yarn",
        "factor": 7.0,
        "beta_fast": 9.0,
        "beta_slow": 0.5,
        "truncate": False,
        "mscale": 0.7,
        "mscale_all_dim": 1.4,
        "original_max_position_embeddings": 70,
    },
    "yarn, attention factor": {**YARN, "attention_factor": 0.9, "beta_fast": 4, "beta_slow": 4},
    "yarn, one mscale": {**YARN, "mscale": 0.7},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.0],
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 60,
    },
    "longrope, stated": {
        "rope_type": "longrope",
        "short_factor": [1.5] * 8,
        "long_factor": [2.0] * 8,
        "factor": 9.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 60,
    },
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("theta", [300.0, 1e6])
def test_rope_frequencies_are_those_of_transformers(name: str, theta: float) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**ROPES[name], "rope_theta": theta}
    peer = transformers.LlamaConfig(**SHAPE, rope_parameters=dict(rope))
    expected, attention = ROPE_INIT_FUNCTIONS[rope["rope_type"]](peer, "cpu")
    for spelled in ({"rope_parameters": rope}, {"rope_theta": theta, "rope_scaling": ROPES[name]}):
        ours = config_of("LlamaForCausalLM", **spelled)
        np.testing.assert_allclose(rope_frequencies(ours), expected.numpy(), rtol=1e-6)
        assert ours.rope_attention_factor == pytest.approx(attention, rel=1e-9)


def test_the_ropes_above_differ() -> None:
    kinds = [tuple(rope_frequencies(config_of("LlamaForCausalLM", rope_scaling=r))) for r in ROPES.values()]
    assert len(set(kinds)) >= len(kinds) - 3  # some differ in their attention factor alone


def test_longrope_ends_the_context_where_its_factors_switch() -> None:
    published = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    long = {"max_position_embeddings": 6400}
    for kind in ("longrope", "su", "yarn"):
        config = config_of("Phi3ForCausalLM", **long, rope_scaling=published | {"type": kind})
        assert config.context_length == 4096
        assert config.rope_attention_factor == pytest.approx((1 + np.log(6400 / 4096) / np.log(4096)) ** 0.5)
    stated = config_of("Phi3ForCausalLM", **long, rope_scaling=published, original_max_position_embeddings=100)
    assert stated.context_length == 100
    short = config_of("Phi3ForCausalLM", rope_scaling=published)
    assert (short.context_length, short.rope_attention_factor) == (200, 1.0)


BROKEN_ROPES: list[tuple[str, dict[str, Any]]] = [
    ("factor", {"rope_type": "linear"}),
    ("factor", {"rope_type": "linear", "factor": "-2"}),
    ("factor", {"rope_type": "llama3", "factor": float("nan")}),
    ("'linear'", {"rope_type": "linear", "factor": "two"}),
    ("'llama3'", {"rope_type": "llama3", "factor": [1]}),
    ("'yarn'", {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}),
    ("short_factor", {"rope_type": "longrope", "short_factor": [1.0, 0.0], "factor": 2.0}),
]


@pytest.mark.parametrize(("word", "rope"), BROKEN_ROPES)
def test_broken_rope_scalings_are_one_line(word: str, rope: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=word) as caught:
        config_of("LlamaForCausalLM", rope_scaling=rope)
    assert "\n" not in str(caught.value)


def test_longrope_needs_a_divisor_for_each_frequency() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 7, "factor": 2.0}
    with pytest.raises(UsageError, match="7 divisors"):
        config_of("LlamaForCausalLM", rope_scaling=rope)


def test_gpt_neox_rope_in_the_older_format() -> None:
    config = config_of("GPTNeoXForCausalLM", head_dim=None, rotary_pct=0.5, rotary_emb_base=700)
    assert (config.rotary_dim, config.rope_theta, config.n_kv_head) == (8, 700.0, 6)
    assert config_of("GPTNeoXForCausalLM", head_dim=None).rotary_dim == 4


def test_defaults_are_the_familys_own() -> None:
    assert (config_of("Gemma2ForCausalLM").logit_softcap, config_of("Gemma2ForCausalLM").attn_softcap) == (30.0, 50.0)
    assert config_of("Gemma3ForCausalLM").attn_scale == 256**-0.5
    assert config_of("GemmaForCausalLM").tie_embeddings
    assert config_of("GemmaForCausalLM", hidden_act="gelu").activation == "gelu_tanh"
    assert config_of("GPTNeoXForCausalLM", hidden_act="gelu").activation == "gelu"
    assert config_of("NanoChatForCausalLM").logit_softcap == 15.0
    assert config_of("NanoChatForCausalLM").activation == "relu2"
    assert config_of("Olmo2ForCausalLM").norm_eps == 1e-5
    assert config_of("GPTNeoXForCausalLM").parallel


@pytest.mark.parametrize("architecture", ["GemmaForCausalLM", "Gemma3ForCausalLM"])
def test_gemma_needs_its_head_dim(architecture: str) -> None:
    with pytest.raises(CheckpointError, match="head_dim"):
        config_of(architecture, head_dim=None)


def test_every_tensor_of_every_family_has_a_place() -> None:
    for family in FAMILIES:
        if family.name in ("gpt2", "nanogpt"):
            continue
        config = config_of(family.architectures[0])
        for name in tensor_shapes(config):
            pieces = name.split(".")
            key = ".".join(["blocks", "{i}", *pieces[2:]]) if pieces[0] == "blocks" else name
            assert key in family.files.parts, (family.name, name)
            assert family.gguf is None or key in family.gguf.parts, (family.name, name)


NEVER_LLAMA = ("qwen", "olmo", "gpt_neox", "gemma", "nanochat")


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("MistralForCausalLM", {"sliding_window": 9}),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 0.5}),
        *(
            (f.architectures[0], {})
            for f in FAMILIES
            if f.name.startswith(("qwen", "olmo", "gpt_neox", "gemma", "nanoc"))
        ),
    ],
)
def test_only_llama_shapes_are_written(architecture: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="differs in"):
        hf_config(config_of(architecture, **changes))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rotary_dim": 6, "head_dim": 4}, "rotary_dim"),
        ({"rotary_dim": 3}, "rotary_dim"),
        ({"windows": (4,)}, "windows"),
        ({"windows": (4, -1)}, "windows"),
    ],
)
def test_impossible_configurations(change: dict[str, Any], word: str) -> None:
    shape = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32, "head_dim": 16, "n_ff": 8}
    with pytest.raises(UsageError, match=word):
        ModelConfig(**{**shape, "vocab_size": 9, "context_length": 9, **change})
