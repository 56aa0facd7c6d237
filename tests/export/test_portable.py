"""The portable graph: standard operators alone, accepted by onnx's checker, and the same model as transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from gptedge.bundle import GRAPH, open_bundle
from gptedge.cli import main
from gptedge.errors import UsageError
from gptedge.export.exporter import export
from gptedge.onnx_file import load_graph
from gptedge.quantize.quantizer import quantize
from gptedge.runtime.session import Session
from tests.export.test_decoder import random_model
from tests.export.test_sources import CONTEXT, VOCAB, content_of, state_of
from tests.logits import assert_close, ids_of, logits_in_pieces, logits_of

# A model for each row of the table of families, with what is unusual about it switched on.
CHOSEN = (
    "llama untied, biased",
    "llama3 rope",
    "mistral, window",
    "phi3, window, partial rope",
    "olmo2",
    "gemma",
    "gemma2",
    "gemma3",
    "nanochat",
    "gpt_neox, a quarter of a small head rotates",
    "qwen2, window in some layers",
    "qwen3",
    "gpt2",
)


def assert_standard(bundle: Path) -> None:
    onnx.checker.check_model(str(bundle / GRAPH), full_check=True)
    graph = load_graph(bundle / GRAPH)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 23)]


@pytest.mark.parametrize("name", CHOSEN)
def test_same_logits_as_transformers(name: str, tmp_path: Path) -> None:
    """In one pass, in chunks and single steps, and token by token from the first."""
    model = random_model(name, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "bundle", portable=True, verify=False)
    assert_standard(tmp_path / "bundle")
    session, ids = Session(open_bundle(tmp_path / "bundle")), ids_of(150, seed=1)
    expected = logits_of(model, ids)
    for sizes in ([150], [37, 1, 1, 60, 1, 50], [1] * 150):
        assert_close(logits_in_pieces(session, ids, sizes), expected)


def test_nanogpt(tmp_path: Path, tiny_checkpoint: Path) -> None:
    small = {"vocab_size": VOCAB, "block_size": CONTEXT}
    content = content_of(state_of(bias=True), bias=True)
    assert small.items() <= content["model_args"].items()
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel", '
        '"add_prefix_space": false, "use_regex": true}, "decoder": {"type": "ByteLevel"}}'
    )
    torch.save(content, tmp_path / "ckpt.pt")
    result = export(tmp_path / "ckpt.pt", tmp_path / "bundle", portable=True, tokenizer=tokenizer)
    assert_standard(tmp_path / "bundle")
    assert result.parity is not None
    assert result.parity.relative_logit_diff < 1e-4


def feeds(graph: Any, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The graph's inputs for a first run, with positions that do not count padding."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    empty = {
        i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32)
        for i in graph.get_inputs()
        if i.name.startswith("past_key_values")
    }
    return {i.name: known.get(i.name, empty.get(i.name)) for i in graph.get_inputs()}


@pytest.mark.parametrize("name", ["mistral, window", "gpt2"])
def test_other_programs_read_it_too(name: str, tmp_path: Path) -> None:
    """onnx's own reference evaluator; and a batch whose second text is padded on the left."""
    import onnxruntime

    random_model(name, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "bundle", portable=True, verify=False)
    path = tmp_path / "bundle" / GRAPH
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = np.array([ids_of(40, seed=2), ids_of(40, seed=3)])
    every = np.ones_like(ids)

    def logits(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return session.run(["logits"], feeds(session, ids, mask))[0]

    alone = logits(ids[:1], every[:1])[0]
    evaluated = ReferenceEvaluator(onnx.load(str(path))).run(["logits"], feeds(session, ids[:1], every[:1]))[0][0]
    assert_close(evaluated, alone)
    padded, mask = ids.copy(), every.copy()
    padded[1, :7], mask[1, :7] = 5, 0
    both = logits(padded, mask)
    assert_close(both[0], alone)
    assert_close(both[1, 7:], logits(ids[1:, 7:], every[1:, 7:])[0])
    # A row that sees nothing is NaN in some programs, and spreads: padding sees itself, as a text of one token does.
    assert_close(both[1, :7], np.repeat(logits(np.array([[5]]), np.array([[1]]))[0], 7, 0))


def test_half_precision(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole, half = (export(tiny_checkpoint, tmp_path / d, dtype=d, portable=True) for d in ("fp32", "fp16"))
    assert_standard(half.bundle)
    assert half.size_mb < 0.6 * whole.size_mb
    assert half.parity is not None
    assert half.parity.relative_logit_diff < 2e-2


def test_a_head_size_that_only_the_standard_operators_take(tmp_path: Path) -> None:
    import json

    random_model("llama", tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    changed = {**config, "head_dim": 8, "num_attention_heads": 12, "num_key_value_heads": 4}
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(changed))
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "a")]) == 5
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "b"), "--portable"]) == 0


def test_exports_are_reproducible(portable_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    export(tiny_checkpoint, tmp_path / "again", portable=True)
    for file in portable_bundle.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_quantize_refuses_it(portable_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"another kind \(portable\); export the model without --portable"):
        quantize(portable_bundle, tmp_path / "out", recipe="int8")
    assert not (tmp_path / "out").exists()
