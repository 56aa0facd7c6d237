"""Verification finds what is wrong with a graph, in the memory of one layer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from gptedge.bundle import GRAPH, GRAPH_DATA, open_bundle
from gptedge.checkpoint import open_checkpoint
from gptedge.errors import BundleError, ParityError
from gptedge.export.exporter import export
from gptedge.export.parity import STAGE_SIZES, Parity, _summary, check, compare, compare_stages
from gptedge.export.reference import Reference
from gptedge.export.stages import cut, run_stages
from gptedge.onnx_file import load_graph, save_graph
from gptedge.runtime.session import Session

ROOT = Path(__file__).parent.parent.parent


def judge(graph: Path, checkpoint: Path, **changes: int) -> Parity:
    source = open_checkpoint(checkpoint)
    c = source.config
    sizes = {"vocab_size": c.vocab_size, "context_length": c.context_length} | changes
    return compare_stages(graph, Reference(c, source.weights()).logits, **sizes)


def test_stages_are_the_whole_graph(tiny_bundle: Path) -> None:
    model = load_graph(tiny_bundle / GRAPH)
    stages = cut(model)
    assert len(stages) == 1 + 3
    names = [{n.name for n in s.nodes} for s in stages]
    assert set.union(*names) == {n.name for n in model.graph.node}
    repeated = {n for i, one in enumerate(names) for other in names[i + 1 :] for n in one & other}
    assert repeated
    assert not any(n.startswith(("blocks", "embed", "head")) for n in repeated)
    assert stages[0].inputs == ["input_ids"]
    assert "logits" in stages[-1].outputs


def test_stages_compute_what_the_session_computes(tiny_bundle: Path) -> None:
    ids = [int(i) for i in np.random.default_rng(5).integers(0, 330, 30)]
    session = Session(open_bundle(tiny_bundle))
    expected = session.run(ids, session.new_cache(), every_row=True)
    for sizes in ([30], [1] * 30, [17, 1, 11, 1]):
        got = run_stages(tiny_bundle / GRAPH, ids, sizes, threads=1)
        np.testing.assert_allclose(got, expected, atol=1e-5 * expected.std())


def test_weights_stored_as_halves_are_widened_where_they_are_used(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export(tiny_checkpoint, tmp_path / "fp16", dtype="fp16")
    stages = cut(load_graph(tmp_path / "fp16" / GRAPH))
    wide = [[n.name for n in s.nodes if n.op_type == "Cast" and n.name.endswith("weight")] for s in stages]
    assert wide[0] == ["embed.weight", "blocks.0.attn.qkv.weight"]
    assert all(name.startswith("blocks.1") or ".0." in name for name in wide[1])
    assert not any(name.endswith("weight") for s in stages for name in s.inputs)


def test_every_position_is_compared(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    parity = judge(tiny_bundle / GRAPH, tiny_checkpoint)
    assert parity.greedy_tokens_compared == parity.greedy_tokens_equal == sum(STAGE_SIZES) == 64
    assert 0 < parity.relative_logit_diff < 1e-4
    assert judge(tiny_bundle / GRAPH, tiny_checkpoint, context_length=11).greedy_tokens_compared == 11
    assert judge(tiny_bundle / GRAPH, tiny_checkpoint, context_length=1).greedy_tokens_compared == 1


def test_free_decoding_agrees_too(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    source = open_checkpoint(tiny_checkpoint)
    parity = compare(Session(open_bundle(tiny_bundle)), Reference(source.config, source.weights()).logits)
    assert parity.greedy_tokens_compared == parity.greedy_tokens_equal == 40


def of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def without_rotation(model: onnx.ModelProto) -> None:
    next(a for a in of(model, "blocks.2.attn").attribute if a.name == "do_rotary").i = 0


def with_another_norm(model: onnx.ModelProto) -> None:
    next(a for a in of(model, "blocks.1.mlp_norm").attribute if a.name == "epsilon").f = 0.1


def with_a_short_window(model: onnx.ModelProto) -> None:
    of(model, "blocks.0.attn").attribute.append(onnx.helper.make_attribute("local_window_size", 50))


def with_gate_and_up_exchanged(model: onnx.ModelProto) -> None:
    outputs = of(model, "blocks.1.mlp.split").output
    outputs[0], outputs[1] = outputs[1], outputs[0]


WRONG = [without_rotation, with_another_norm, with_a_short_window, with_gate_and_up_exchanged]


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_graph_is_found(
    change: Callable[[onnx.ModelProto], None], tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = load_graph(tiny_bundle / GRAPH)
    change(model)
    save_graph(tmp_path / GRAPH, model)
    shutil.copy(tiny_bundle / GRAPH_DATA, tmp_path)
    with pytest.raises(ParityError, match="differ"):
        check(judge(tmp_path / GRAPH, tiny_checkpoint), "fp32")


def test_a_wrong_byte_is_found(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_bundle / GRAPH, tmp_path)
    data = np.fromfile(tiny_bundle / GRAPH_DATA, np.float32)
    data[-5] += 30
    data.tofile(tmp_path / GRAPH_DATA)
    with pytest.raises(ParityError):
        check(judge(tmp_path / GRAPH, tiny_checkpoint), "fp32")


def test_a_graph_that_does_not_load_is_one_line(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_bundle / GRAPH, tmp_path)
    (tmp_path / GRAPH_DATA).write_bytes((tiny_bundle / GRAPH_DATA).read_bytes()[:-9])
    with pytest.raises(BundleError) as caught:
        judge(tmp_path / GRAPH, tiny_checkpoint)
    assert "\n" not in str(caught.value)


def test_nan_fails() -> None:
    with pytest.raises(ParityError):
        check(Parity(float("nan"), float("nan"), 9, 9), "fp32")


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """160 MB of weights more, and the same memory."""
    shape = ["--width", "512", "--ff", "2048", "--heads", "8", "--vocab", "5003", "--layers", "2", "12"]
    command = [
        sys.executable,
        ROOT / "benchmarks" / "export_memory.py",
        *shape,
        "--json",
        "--folder",
        tmp_path / "work",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    few, many = json.loads(done.stdout)
    assert many["size_mb"] > few["size_mb"] + 150
    assert many["peak_rss_mb"] < few["peak_rss_mb"] + 25


def test_logits_that_are_all_the_same() -> None:
    """As of a model whose head is still zero: an exact copy is one, and anything else is infinitely far."""
    zeros, chosen = np.zeros((3, 5), np.float32), np.zeros(3, np.int64)
    assert _summary(zeros.copy(), zeros, chosen).relative_logit_diff == 0
    assert _summary(zeros + np.float32(0.1), zeros, chosen).relative_logit_diff == np.inf
