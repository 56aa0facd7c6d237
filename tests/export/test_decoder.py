"""The exported graph against PyTorch's GPT and Hugging Face's transformers: prefill, chunks, cached decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from gptedge.bundle import GRAPH, open_bundle
from gptedge.checkpoint import TOKENIZER, open_checkpoint
from gptedge.export.exporter import export
from gptedge.families import FAMILIES, family_of
from gptedge.onnx_file import load_graph, read_initializer
from gptedge.quantize.quantizer import quantize
from gptedge.quantize.torch_graph import TorchGraph
from gptedge.runtime.batch import Rows
from gptedge.runtime.session import PREFILL_AT_LEAST, Session
from gptedge.train.model import GPT, Cache
from tests.conftest import make_tokenizer
from tests.logits import VOCAB_SIZE, assert_close, ids_of, logits_in_pieces, logits_of

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 84,
    "intermediate_size": 150,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PAD = {"pad_token_id": 0}
NEOX = {**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}, "hidden_size": 192}
ROTARY_HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0, "partial_rotary_factor": 0.5}}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 3000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 3000.0,
    "factor": 6.0,
    "beta_fast": 8.0,
    "original_max_position_embeddings": 33,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 3000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [7.0] * 8,
    "attention_factor": 1.2,
}
# name -> (transformers' configuration class, its settings)
MODELS: dict[str, tuple[Callable[..., transformers.PreTrainedConfig], dict[str, object]]] = {
    "llama": (transformers.LlamaConfig, {**SHAPE, "head_dim": 16, "tie_word_embeddings": True}),
    "llama untied, biased": (
        transformers.LlamaConfig,
        {**SHAPE, "head_dim": 16, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "llama3 rope": (transformers.LlamaConfig, {**SHAPE, "head_dim": 16, "rope_parameters": LLAMA3_ROPE}),
    "linear rope": (
        transformers.LlamaConfig,
        {**SHAPE, "head_dim": 16, "rope_parameters": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 3.0}},
    ),
    "yarn": (transformers.LlamaConfig, {**SHAPE, "head_dim": 16, "rope_parameters": YARN}),
    "yarn in gemma3's full layers": (
        transformers.Gemma3TextConfig,
        {
            **SHAPE,
            **PAD,
            "head_dim": 32,
            "sliding_window": 23,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": YARN,
            },
        },
    ),
    "longrope": (
        transformers.Phi3Config,
        {**SHAPE, **PAD, "hidden_size": 96, "original_max_position_embeddings": 170, "rope_parameters": LONGROPE},
    ),
    "longrope in a quarter of the head": (
        transformers.Phi3Config,
        {
            **SHAPE,
            **PAD,
            "hidden_size": 192,
            "original_max_position_embeddings": 170,
            "rope_parameters": {
                **LONGROPE,
                "short_factor": [1.0, 1.2, 1.5, 2.0],
                "long_factor": [7.0] * 4,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    "mistral": (transformers.MistralConfig, {**SHAPE, "head_dim": 32, "sliding_window": None}),
    "mistral, window": (transformers.MistralConfig, {**SHAPE, "head_dim": 32, "sliding_window": 21}),
    "phi3": (transformers.Phi3Config, {**SHAPE, **PAD, "hidden_size": 96}),
    "phi3, window, partial rope": (
        transformers.Phi3Config,
        {
            **SHAPE,
            **PAD,
            "hidden_size": 192,
            "sliding_window": 33,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "olmo2": (transformers.Olmo2Config, {**SHAPE, **PAD, "hidden_size": 96, "attention_bias": True}),
    "gemma": (transformers.GemmaConfig, {**SHAPE, **PAD, "head_dim": 32, "hidden_act": "gelu"}),
    "gemma2": (
        transformers.Gemma2Config,
        {
            **SHAPE,
            **PAD,
            "head_dim": 32,
            "sliding_window": 19,
            "query_pre_attn_scalar": 50,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            **SHAPE,
            **PAD,
            "head_dim": 32,
            "sliding_window": 23,
            "query_pre_attn_scalar": 50,
            "sliding_window_pattern": 3,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 4000.0, "factor": 3.0},
            },
        },
    ),
    "gemma3, window beyond the context": (
        transformers.Gemma3TextConfig,
        {**SHAPE, **PAD, "head_dim": 32, "sliding_window": 230, "sliding_window_pattern": 2},
    ),
    "nanochat": (
        transformers.NanoChatConfig,
        {**SHAPE, **PAD, "hidden_size": 96, "attention_bias": True, "final_logit_softcapping": 3.0},
    ),
    "nanochat, unbounded": (
        transformers.NanoChatConfig,
        {**SHAPE, **PAD, "hidden_size": 96, "final_logit_softcapping": None, "tie_word_embeddings": True},
    ),
    "gpt_neox": (transformers.GPTNeoXConfig, {**NEOX, **ROTARY_HALF}),
    "gpt_neox, a quarter of a small head rotates": (transformers.GPTNeoXConfig, NEOX),
    "gpt_neox, sequential, unbiased, tied": (
        transformers.GPTNeoXConfig,
        {
            **NEOX,
            **ROTARY_HALF,
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_fast",
        },
    ),
    "qwen2, window in some layers": (
        transformers.Qwen2Config,
        {**SHAPE, "hidden_size": 96, "use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1},
    ),
    "qwen2": (transformers.Qwen2Config, {**SHAPE, "hidden_size": 96, "tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {**SHAPE, "head_dim": 32}),
    "gpt2": (
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


def random_model(name: str, folder: Path) -> torch.nn.Module:
    """A model of MODELS, with its checkpoint written to `folder`."""
    make, settings = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make(**settings)).eval()
    with torch.no_grad():  # biases and gains start as zeros and ones, which would hide their being forgotten
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    (folder / TOKENIZER).write_text(json.dumps(make_tokenizer().to_dict()))
    return model


@pytest.fixture(scope="module", params=MODELS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, Path, Path]:
    """A random model of transformers, its checkpoint, and the bundle made of it."""
    folder = tmp_path_factory.mktemp("pair")
    model = random_model(request.param, folder / "checkpoint")
    export(folder / "checkpoint", folder / "bundle")
    return model, folder / "checkpoint", folder / "bundle"


def test_prefill(pair: tuple[torch.nn.Module, Path, Path]) -> None:
    model, _, bundle = pair
    session, ids = Session(open_bundle(bundle)), ids_of(150)
    assert_close(session.run(ids, session.new_cache(), every_row=True), logits_of(model, ids))


def test_chunks_and_single_steps(pair: tuple[torch.nn.Module, Path, Path]) -> None:
    model, _, bundle = pair
    session, ids = Session(open_bundle(bundle)), ids_of(150, seed=1)
    assert_close(logits_in_pieces(session, ids, (37, 1, 1, 60, 1, 50)), logits_of(model, ids))


def test_greedy_tokens(pair: tuple[torch.nn.Module, Path, Path]) -> None:
    model, _, bundle = pair
    session, ids = Session(open_bundle(bundle)), ids_of(11, seed=2)
    cache, ours = session.new_cache(), []
    logits = session.prefill(ids, cache)
    for _ in range(64):
        assert logits is not None
        ours.append(int(logits.argmax()))
        logits = session.run(ours[-1:], cache)[0]
    theirs = model.generate(
        torch.tensor([ids]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
    )
    assert ours == theirs[0, len(ids) :].tolist()


def test_rows_of_a_batch_are_as_alone(pair: tuple[torch.nn.Module, Path, Path]) -> None:
    """Rows of different lengths, windows and learned positions included, one of which leaves."""
    session = Session(open_bundle(pair[2]), threads=1)
    prompts = [ids_of(n, seed=n) for n in (70, 9, 33)]
    rows, alone = Rows(session, 3), [session.new_cache() for _ in prompts]
    for row, (ids, cache) in enumerate(zip(prompts, alone, strict=True)):
        session.prefill(ids, rows.reserve(row, len(ids)))
        session.prefill(ids, cache)
    for ids in ([0, 5, 7], [1, 5, 9], [4, 4, 4]):
        each = [session.run([t], cache) for t, cache in zip(ids, alone, strict=True)]
        assert_close(rows.run(ids), np.concatenate(each))
    rows.move(2, 0)
    assert_close(rows.run([3, 4]), np.concatenate([session.run([3], alone[2]), session.run([4], alone[1])]))


def test_pytorch_gpt_agrees_too(pair: tuple[torch.nn.Module, Path, Path]) -> None:
    model, checkpoint, _ = pair
    ids = ids_of(90, seed=3)
    assert_close(logits_of(GPT.from_checkpoint(open_checkpoint(checkpoint)).eval(), ids), logits_of(model, ids))


def test_pytorch_gpt_with_its_cache(pair: tuple[torch.nn.Module, Path, Path]) -> None:
    model, checkpoint, _ = pair
    gpt, ids, cache = GPT.from_checkpoint(open_checkpoint(checkpoint)).eval(), ids_of(70, seed=4), Cache()
    with torch.no_grad():
        rows = [gpt(torch.tensor([chunk]), cache)[0].numpy() for chunk in (ids[:41], ids[41:42], ids[42:])]
    assert_close(np.concatenate(rows), logits_of(model, ids))


def test_every_family_is_among_the_models_above() -> None:
    made = {family_of(make(**settings).to_dict() | {"architectures": None}).name for make, settings in MODELS.values()}
    assert made == {family.name for family in FAMILIES} - {"nanogpt"}  # which has a test of its own, in test_sources


def test_last_row_alone_is_the_last_of_all(pair: tuple[torch.nn.Module, Path, Path]) -> None:
    _, _, bundle = pair
    session, ids = Session(open_bundle(bundle)), ids_of(40)
    every = session.run(ids, session.new_cache(), every_row=True)
    np.testing.assert_allclose(session.run(ids, session.new_cache()), every[-1:], atol=1e-5 * every.std())


def test_int8_computes_nearly_the_same(pair: tuple[torch.nn.Module, Path, Path], tmp_path: Path) -> None:
    """Weights, the graph for prompts, keys and values; windows, soft caps and learned positions included."""
    _, _, bundle = pair
    ids = ids_of(60)
    quantize(bundle, tmp_path / "int8", recipe="int8", prefill="int8", kv="int8")
    plain, small = (Session(open_bundle(b)) for b in (bundle, tmp_path / "int8"))
    expected, got = (s.run(ids, s.new_cache(), every_row=True) for s in (plain, small))
    assert np.abs(got - expected).mean() <= 0.2 * expected.std()
    caches = [s.new_cache() for s in (plain, small)]
    for session, cache in zip((plain, small), caches, strict=True):
        session.prefill(ids_of(PREFILL_AT_LEAST + 20), cache)
    expected, got = (s.run(ids_of(30), c, every_row=True) for s, c in zip((plain, small), caches, strict=True))
    assert np.abs(got - expected).mean() <= 0.2 * expected.std()
    assert "_prompt_graph" in vars(small)


def test_graph_as_a_module_of_torch(pair: tuple[torch.nn.Module, Path, Path]) -> None:
    """What distilling trains."""
    model, _, bundle = pair
    graph = TorchGraph(load_graph(bundle / GRAPH), partial(read_initializer, folder=bundle))
    with torch.no_grad():
        got = graph(torch.tensor([ids_of(60)]))[0].numpy()
    assert_close(got, logits_of(model, ids_of(60)))


def test_graph_of_a_stranger_sees_only_the_contract(pair: tuple[torch.nn.Module, Path, Path]) -> None:
    """Programs that do not know of first_logit get every row, and an exact-length present."""
    import onnxruntime

    model, _, bundle = pair
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = ids_of(20)
    feeds = {}
    for i in session.get_inputs():
        if i.name == "input_ids":
            feeds[i.name] = np.array([ids])
        elif i.name == "attention_mask":
            feeds[i.name] = np.ones((1, 20), np.int64)
        elif i.name == "position_ids":
            feeds[i.name] = np.arange(20)[None]
        else:
            feeds[i.name] = np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
    logits, key = session.run(["logits", "present.0.key"], feeds)
    assert_close(logits[0], logits_of(model, ids))
    assert key.shape[2] == 20
