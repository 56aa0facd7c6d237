"""Attention that sees a window alone, over prompts longer than the window and than what is run at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from gptedge.bundle import open_bundle
from gptedge.checkpoint import TOKENIZER
from gptedge.export.exporter import export
from gptedge.quantize.quantizer import quantize
from gptedge.runtime.session import PREFILL_CHUNK, Session
from tests.conftest import make_tokenizer
from tests.logits import VOCAB_SIZE, ids_of, logits_in_pieces

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 700,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LENGTH = 2 * PREFILL_CHUNK + 90
MODELS = {
    "every layer, less than a piece": transformers.MistralConfig(**SHAPE, sliding_window=40),
    "every layer, more than a piece": transformers.MistralConfig(**SHAPE, sliding_window=PREFILL_CHUNK + 50),
    "some layers": transformers.Gemma3TextConfig(**SHAPE, sliding_window=70, sliding_window_pattern=2),
}


@pytest.fixture(scope="module", params=MODELS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[request.param]).eval()
    model.save_pretrained(folder / "checkpoint")
    (folder / "checkpoint" / TOKENIZER).write_text(json.dumps(make_tokenizer().to_dict()))
    with torch.no_grad():
        np.save(folder / "expected.npy", model(torch.tensor([ids_of(LENGTH)])).logits[0].numpy())
    return export(folder / "checkpoint", folder / "bundle", verify=False).bundle


def tail(session: Session, sizes: list[int]) -> np.ndarray:
    """The last ten rows of logits when the text is run in these pieces."""
    return logits_in_pieces(session, ids_of(LENGTH), sizes)[-10:]


PIECES = ([LENGTH], [PREFILL_CHUNK, PREFILL_CHUNK, 90], [200, 1, 1, 290, LENGTH - 502, 10])


def test_however_it_is_cut(bundle: Path) -> None:
    session, expected = Session(open_bundle(bundle), threads=1), np.load(bundle.parent / "expected.npy")
    for sizes in PIECES:
        assert np.abs(tail(session, sizes) - expected[-10:]).max() <= 1e-3 * expected.std()
    prompt = session.prefill(ids_of(LENGTH), session.new_cache())
    assert np.abs(prompt - expected[-1]).max() <= 1e-3 * expected.std()


def test_over_an_int8_cache_with_a_graph_for_prompts(bundle: Path, tmp_path: Path) -> None:
    expected = np.load(bundle.parent / "expected.npy")
    quantize(bundle, tmp_path / "small", recipe="int8-weight", prefill="int8", kv="int8", threads=1)
    session = Session(open_bundle(tmp_path / "small"), threads=1)
    whole, *cut = (tail(session, sizes) for sizes in PIECES)
    assert np.abs(whole - expected[-10:]).mean() < 0.1 * expected.std()
    for rows in cut:
        assert np.abs(rows - whole).mean() < 0.02 * expected.std()
    prompt = session.prefill(ids_of(LENGTH), session.new_cache())
    assert "_prompt_graph" in vars(session)
    assert np.abs(prompt - expected[-1]).mean() < 0.2 * expected.std()
