"""Every architecture that llama.cpp has among ours, written as its converter does, read back, and compared.

The writer below takes names from the `gguf` package's own table and follows the converter's conventions, written down
from its documentation of the format: rows of q and k in pairs (llama only), Gemma's gains with one added, GPT-NeoX's
q, k and v one after another, GPT-2's matrices transposed. transformers, which reads some of these files too, is a
second reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from gptedge.bundle import open_bundle
from gptedge.checkpoint import TOKENIZER
from gptedge.errors import CheckpointError, UnsupportedModelError
from gptedge.export.exporter import export
from gptedge.export.sources.gguf_configs import ARCHITECTURES
from gptedge.export.sources.gguf_file import open_gguf
from gptedge.runtime.session import Session
from gptedge.train.model import GPT
from tests.conftest import make_tokenizer
from tests.export.gguf_files import interleave, save
from tests.logits import VOCAB_SIZE, assert_close, ids_of, logits_in_pieces, logits_of

Settings = dict[str, Any]
SHAPE: Settings = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 152,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FULL_NEOX = {**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}, "hidden_size": 192}


def rope(theta: float = 3000.0, **more: Any) -> Settings:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


YARN = rope(
    rope_type="yarn",
    factor=6.0,
    original_max_position_embeddings=33,
    beta_fast=8.0,
    beta_slow=2.0,
    attention_factor=1.3,
)
LLAMA3 = rope(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=40,
)
LONGROPE = rope(rope_type="longrope", short_factor=[1.0, 1.2, 1.5, 1.7, 2.0, 2.5, 3.0, 4.0], long_factor=[9.0] * 8)
GEMMA3_ROPES = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 4000.0, "factor": 3.0},
    }
}
GEMMA3_PLAIN_ROPES = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 4000.0},
    }
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32}
# name -> (llama.cpp's architecture, transformers' configuration class, settings)
MODELS: dict[str, tuple[str, Callable[..., transformers.PreTrainedConfig], Settings]] = {
    "llama": ("llama", transformers.LlamaConfig, {**SHAPE, **rope(), "tie_word_embeddings": True}),
    "llama, biased": ("llama", transformers.LlamaConfig, {**SHAPE, **rope(), "attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", transformers.LlamaConfig, {**SHAPE, **LLAMA3, "head_dim": 32}),
    "mistral": ("llama", transformers.MistralConfig, {**SHAPE, **rope(), "head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", transformers.Qwen2Config, {**SHAPE, **rope(), "tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", transformers.Qwen2Config, {**SHAPE, **YARN}),
    "qwen3": ("qwen3", transformers.Qwen3Config, {**SHAPE, **rope(), "head_dim": 32}),
    "phi3": ("phi3", transformers.Phi3Config, {**SHAPE, **rope(), "sliding_window": 33}),
    "phi3, part of the head rotates": (
        "phi3",
        transformers.Phi3Config,
        {**SHAPE, "hidden_size": 192, **rope(partial_rotary_factor=0.5), "tie_word_embeddings": True},
    ),
    "phi3, longrope": (
        "phi3",
        transformers.Phi3Config,
        {**SHAPE, **LONGROPE, "max_position_embeddings": 800, "original_max_position_embeddings": 200},
    ),
    "olmo2": ("olmo2", transformers.Olmo2Config, {**SHAPE, **rope()}),
    "gptneox": ("gptneox", transformers.GPTNeoXConfig, {**FULL_NEOX, **rope(10000.0, partial_rotary_factor=0.5)}),
    "gptneox, sequential": (
        "gptneox",
        transformers.GPTNeoXConfig,
        {**FULL_NEOX, **rope(10000.0, partial_rotary_factor=0.25), "use_parallel_residual": False},
    ),
    "gemma": ("gemma", transformers.GemmaConfig, {**SHAPE, **rope(10000.0), "head_dim": 32}),
    "gemma2": (
        "gemma2",
        transformers.Gemma2Config,
        {
            **SHAPE,
            **GEMMA,
            **rope(10000.0),
            "sliding_window": 19,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        "gemma3",
        transformers.Gemma3TextConfig,
        {**SHAPE, **GEMMA, **GEMMA3_ROPES, "num_hidden_layers": 7, "sliding_window": 23},
    ),
    # transformers' own reader takes these sizes for granted.
    "qwen3, its usual head": ("qwen3", transformers.Qwen3Config, {**SHAPE, **rope(), "head_dim": 128}),
    "gemma2, its usual head": ("gemma2", transformers.Gemma2Config, {**SHAPE, **rope(10000.0), "sliding_window": 19}),
    "gemma3, its usual head": (
        "gemma3",
        transformers.Gemma3TextConfig,
        {**SHAPE, **GEMMA3_PLAIN_ROPES, "num_hidden_layers": 7, "sliding_window": 23},
    ),
    "gpt2": (
        "gpt2",
        transformers.GPT2Config,
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 96,
            "n_layer": 3,
            "n_head": 6,
            "n_positions": 200,
            "initializer_range": 0.25,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
}
READ_BY_TRANSFORMERS = (
    *("llama", "mistral", "qwen2"),
    *("qwen3, its usual head", "gemma2, its usual head", "gemma3, its usual head"),
)


# ---- the writer ----------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path,
    architecture: str,
    model: transformers.PreTrainedModel,
    change: Callable[[gguf.GGUFWriter], None] = lambda w: None,
) -> Path:
    w = gguf.GGUFWriter(path, architecture)
    c = model.config.to_dict()
    _write_keys(w, architecture, c)
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, architecture.upper()), _first(c, "num_hidden_layers", "n_layer")
    )
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and c["tie_word_embeddings"]:
            continue
        array = value.numpy()
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise AssertionError(name)
        w.add_tensor(theirs, np.ascontiguousarray(_converted(architecture, c, name, array)))
    change(w)
    save(w)
    return path


def _first(c: Mapping[str, Any], *keys: str) -> Any:
    return next(c[key] for key in keys if c.get(key) is not None)


def _converted(architecture: str, c: Settings, name: str, array: np.ndarray) -> np.ndarray:
    if architecture == "llama" and ".q_proj." in name:
        return interleave(array, c["num_attention_heads"])
    if architecture == "llama" and ".k_proj." in name:
        return interleave(array, c["num_key_value_heads"])
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1
    if architecture == "gptneox" and ".query_key_value." in name:
        heads = c["num_attention_heads"]
        return np.concatenate(
            [array.reshape(heads, 3, -1, *array.shape[1:])[:, i].reshape(-1, *array.shape[1:]) for i in range(3)]
        )
    if architecture == "gpt2" and array.ndim == 2 and ("c_" in name):
        return array.T
    return array


def _write_keys(w: gguf.GGUFWriter, architecture: str, c: Settings) -> None:
    w.add_vocab_size(VOCAB_SIZE)
    w.add_context_length(_first(c, "max_position_embeddings", "n_positions"))
    w.add_embedding_length(_first(c, "hidden_size", "n_embd"))
    w.add_block_count(_first(c, "num_hidden_layers", "n_layer"))
    w.add_feed_forward_length(c.get("intermediate_size") or 4 * c["n_embd"])
    w.add_head_count(_first(c, "num_attention_heads", "n_head"))
    if "rms_norm_eps" in c:
        w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    else:
        w.add_layer_norm_eps(_first(c, "layer_norm_eps", "layer_norm_epsilon"))
    if c.get("num_key_value_heads"):
        w.add_head_count_kv(c["num_key_value_heads"])
    if c.get("head_dim"):
        w.add_key_length(c["head_dim"])
        w.add_value_length(c["head_dim"])
    if architecture == "gptneox":
        w.add_parallel_residual(c["use_parallel_residual"])
    for key, add in (
        ("attn_logit_softcapping", w.add_attn_logit_softcapping),
        ("final_logit_softcapping", w.add_final_logit_softcapping),
    ):
        if c.get(key):
            add(c[key])
    if architecture in ("phi3", "gemma2", "gemma3"):
        w.add_sliding_window(c["sliding_window"] or 0)
    if c.get("rope_parameters"):
        _write_rope(w, architecture, c, c["rope_parameters"].get("full_attention", c["rope_parameters"]))


def _write_rope(w: gguf.GGUFWriter, architecture: str, c: Settings, r: Settings) -> None:
    head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    rotary = int(head * r.get("partial_rotary_factor", 1.0))
    if architecture in ("llama", "phi3", "gptneox"):
        w.add_rope_dimension_count(rotary)
    if architecture != "gptneox":
        w.add_rope_freq_base(r["rope_theta"])
    if r["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(r["factor"])
    if r["rope_type"] == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(r["factor"])
        w.add_rope_scaling_orig_ctx_len(r["original_max_position_embeddings"])
        w.add_rope_scaling_yarn_attn_factor(r["attention_factor"])
        w.add_rope_scaling_yarn_beta_fast(r["beta_fast"])
        w.add_rope_scaling_yarn_beta_slow(r["beta_slow"])
    if r["rope_type"] == "llama3":
        w.add_rope_scaling_orig_ctx_len(r["original_max_position_embeddings"])
        w.add_tensor("rope_freqs.weight", _llama3_divisors(r, head))
    if architecture == "phi3":
        w.add_rope_scaling_orig_ctx_len(c["original_max_position_embeddings"])
    if r["rope_type"] == "longrope":
        original = c["original_max_position_embeddings"]
        ratio = c["max_position_embeddings"] / original
        w.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(ratio) / math.log(original)))
        for length in ("long", "short"):
            w.add_tensor(f"rope_factors_{length}.weight", np.array(r[f"{length}_factor"], np.float32))


def _llama3_divisors(r: Settings, head: int) -> np.ndarray:
    """transformers' frequencies, as divisors of the plain ones."""
    peer = transformers.LlamaConfig(head_dim=head, rope_parameters=dict(r))
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](peer, "cpu")
    plain = r["rope_theta"] ** (-np.arange(0, head, 2) / head)
    return (plain / scaled.numpy()).astype(np.float32)


# ---- what is compared ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=MODELS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    architecture, make, settings = MODELS[request.param]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.2 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("gguf")
    return request.param, model, write_gguf(folder / "m.gguf", architecture, model)


def test_exported_from_gguf_equals_the_original(written: tuple[str, Any, Path], tmp_path: Path) -> None:
    _, model, path = written
    (tmp_path / TOKENIZER).write_text(json.dumps(make_tokenizer().to_dict()))
    bundle = export(path, tmp_path / "bundle", tokenizer=tmp_path / TOKENIZER).bundle
    session, ids = Session(open_bundle(bundle)), ids_of(120)
    assert_close(logits_in_pieces(session, ids, (70, 1, 49)), logits_of(model, ids))


def test_pytorch_gpt_reads_it_too(written: tuple[str, Any, Path]) -> None:
    _, model, path = written
    ids = ids_of(100)
    expected = logits_of(model, ids)
    got = logits_of(GPT.from_checkpoint(open_gguf(path)), ids)
    assert np.abs(got - expected).max() <= 1e-3 * expected.std()


@pytest.mark.parametrize("written", READ_BY_TRANSFORMERS, indirect=True)
def test_transformers_reads_the_same(written: tuple[str, Any, Path]) -> None:
    """Those architectures, and options of them, that it reads."""
    _, model, path = written
    peer = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = ids_of(60)
    expected = logits_of(model, ids)
    assert np.abs(logits_of(peer.eval(), ids) - expected).max() <= 1e-3 * expected.std()


def test_every_architecture_is_here() -> None:
    assert {architecture for architecture, _, _ in MODELS.values()} == set(ARCHITECTURES)


def test_27b_gemmas_scale_scores_by_the_width_that_their_heads_would_have(tmp_path: Path) -> None:
    for layers, expected in ((46, 16.0), (4, 32.0)):
        path = tmp_path / f"{layers}.gguf"
        w = gguf.GGUFWriter(path, "gemma2")
        c = transformers.Gemma2Config(**{**SHAPE, **GEMMA, "num_hidden_layers": layers}).to_dict()
        _write_keys(w, "gemma2", c)
        w.add_tensor("token_embd.weight", np.ones((VOCAB_SIZE, 96), np.float32))
        save(w)
        assert open_gguf(path).config.attn_scale == pytest.approx(expected**-0.5)


@pytest.mark.parametrize(
    ("name", "change", "kind", "word"),
    [
        ("phi3, longrope", {"drop": "rope_factors_short.weight"}, CheckpointError, "rope_factors_short"),
        ("phi3, longrope", {"drop": "phi3.rope.scaling.original_context_length"}, CheckpointError, "original_context"),
        ("qwen2, yarn", {"qwen2.rope.scaling.yarn_ext_factor": 0.5}, UnsupportedModelError, "yarn_ext_factor"),
        ("qwen2, yarn", {"qwen2.rope.scaling.yarn_log_multiplier": 0.1}, UnsupportedModelError, "yarn_log_multiplier"),
        ("qwen2, yarn", {"qwen2.rope.scaling.type": "dynamic"}, UnsupportedModelError, "'dynamic'"),
        ("gemma2", {"gemma2.attention.value_length": 16}, UnsupportedModelError, "value_length"),
        ("llama", {"drop": "blk.1.ffn_up.weight"}, CheckpointError, r"blk\.1\.ffn_up\.weight"),
    ],
)
def test_what_a_file_lacks_or_has_too_much_of(
    name: str, change: Settings, kind: type[Exception], word: str, tmp_path: Path
) -> None:
    architecture, make, settings = MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(make(**settings))
    dropped = change.get("drop")

    def with_changes(w: gguf.GGUFWriter) -> None:
        for key, value in change.items():
            if key != "drop":
                w.kv_data[0].pop(key, None)
                w.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        w.kv_data[0].pop(dropped, None)
        w.tensors[0].pop(dropped, None)

    write_gguf(tmp_path / "m.gguf", architecture, model, with_changes)
    with pytest.raises(kind, match=word) as caught:
        open_gguf(tmp_path / "m.gguf").weights()
    assert "\n" not in str(caught.value)
