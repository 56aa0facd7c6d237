"""Quantized bundles: sizes, bytes, what is refused, and what the graph looks like."""

from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import onnx
import pytest

from gptedge.bundle import open_bundle, verify
from gptedge.errors import BundleError, OutputExistsError, UnsupportedModelError, UsageError
from gptedge.evaluate.divergence import evaluate
from gptedge.onnx_file import load_graph
from gptedge.quantize.passes import find_targets
from gptedge.quantize.quantizer import quantize
from gptedge.quantize.recipes import RECIPES
from gptedge.runtime.session import Session


def test_same_input_same_bytes(tiny_bundle: Path, quantized_bundle: Path, tmp_path: Path) -> None:
    again = quantize(tiny_bundle, tmp_path / "again", recipe=quantized_bundle.name, threads=1).bundle
    names = sorted(f.name for f in quantized_bundle.iterdir())
    assert names == sorted(f.name for f in again.iterdir())
    assert filecmp.cmpfiles(quantized_bundle, again, names, shallow=False) == (names, [], [])


def test_bundle_is_whole_and_smaller(tiny_bundle: Path, quantized_bundle: Path) -> None:
    bundle = open_bundle(quantized_bundle)
    verify(bundle)
    assert bundle.recipe == quantized_bundle.name
    assert bundle.size_bytes < 0.5 * open_bundle(tiny_bundle).size_bytes


def test_no_float_matrix_is_left_and_the_table_is_stored_once(quantized_bundle: Path) -> None:
    graph = onnx.load(quantized_bundle / "model.onnx", load_external_data=False).graph
    kinds = [n.op_type for n in graph.node]
    products = {"int8": ("MatMulIntegerToFloat", "MatMulNBits"), "int8-weight": ("FusedMatMul",)}
    used = products.get(quantized_bundle.name, ("MatMulNBits",))
    assert {"MatMulIntegerToFloat", "MatMulNBits", "FusedMatMul"}.intersection(kinds) == set(used)
    per_layer = 5 if quantized_bundle.name == "int8" else 4  # gate and up are a product of integers each
    assert sum(map(kinds.count, used)) == 3 * per_layer + 1
    lookup = next(n for n in graph.node if n.op_type == "GatherBlockQuantized")
    head = next(n for n in graph.node if n.name == "head")
    bytes_of = {n.output[0]: n.input[0] for n in graph.node if n.name.endswith(".integers")}
    assert lookup.input[0] == bytes_of.get("embed.weight.integers", head.input[1])
    large = [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 1000]
    assert large == []


def test_quality_is_measured_on_the_graph(tiny_bundle: Path, quantized_bundle: Path) -> None:
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 300, 400)]
    result = evaluate(
        Session(open_bundle(quantized_bundle), threads=1),
        ids,
        reference=Session(open_bundle(tiny_bundle), threads=1),
        context=100,
    )
    assert result.kl_divergence is not None
    # The weights are random and the logits wide: a broken layout gives a divergence of a hundred and more.
    assert 0 < result.kl_divergence["mean"] < (0.3 if "int8" in quantized_bundle.name else 9.0)


def test_half_precision_bundles_quantize_alike(tiny_checkpoint: Path, quantized_bundle: Path, tmp_path: Path) -> None:
    from gptedge.export.exporter import export

    half = export(tiny_checkpoint, tmp_path / "fp16", dtype="fp16")
    made = quantize(half.bundle, tmp_path / "small", recipe=quantized_bundle.name)
    a, b = (Session(open_bundle(p), threads=1) for p in (made.bundle, quantized_bundle))
    ids = list(range(5, 60))
    x, y = (s.run(ids, s.new_cache(), every_row=True) for s in (a, b))
    # int4 learns from text that the two bundles write differently.
    assert np.corrcoef(x.ravel(), y.ravel())[0, 1] > (0.8 if quantized_bundle.name == "int4" else 0.98)


def test_quantized_bundles_are_not_quantized_again(quantized_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is quantized already"):
        quantize(quantized_bundle, tmp_path / "out", recipe="int8")
    assert list(tmp_path.iterdir()) == []


def test_unknown_recipe_and_existing_output(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipe 'int5' is not known"):
        quantize(tiny_bundle, tmp_path / "out", recipe="int5")
    with pytest.raises(OutputExistsError, match="exists already"):
        quantize(tiny_bundle, tmp_path, recipe="int8")


def test_interrupt_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, note: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_bundle, tmp_path / "out", recipe="int8", report=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_damaged_source_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[-5] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match="sha256"):
        quantize(copy, tmp_path / "out", recipe="int8")


@pytest.mark.parametrize(("name", "value"), [("alpha", 0.5), ("transA", 1), ("transBatchB", 1)])
def test_products_with_options_of_their_own_are_refused(name: str, value: float, tiny_bundle: Path) -> None:
    model = load_graph(tiny_bundle / "model.onnx")
    node = next(n for n in model.graph.node if n.name == "blocks.1.mlp.down")
    node.attribute.append(onnx.helper.make_attribute("alpha", 1.0))
    assert len(find_targets(model, RECIPES["int8"])) == 3 * 4 + 1
    node.attribute[-1].CopyFrom(onnx.helper.make_attribute(name, value))
    with pytest.raises(UnsupportedModelError, match=rf"blocks\.1\.mlp\.down has {name} = {value:g}"):
        find_targets(model, RECIPES["int8"])
