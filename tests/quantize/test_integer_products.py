"""Products of integers: exact at the ends of their ranges, the same in both spellings, and token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper

from gptedge.bundle import GRAPH, GRAPH_DATA, open_bundle, signed
from gptedge.errors import DataError
from gptedge.onnx_file import IR_VERSION, MICROSOFT, OPSETS, load_graph
from gptedge.quantize import integer_products
from gptedge.quantize.integer_products import Columns
from gptedge.quantize.passes import Target, arrays_of, find_targets, rewrite
from gptedge.quantize.quantizer import quantize
from gptedge.quantize.recipes import WHOLE_ROWS, Group, Recipe, Scheme
from gptedge.quantize.seams import Seam
from gptedge.quantize.smooth import Smoothing, _factors, least_noise
from gptedge.quantize.walk import Walk
from gptedge.runtime import onnx_runtime
from gptedge.runtime.onnx_runtime import import_onnxruntime, multiplies_signed_bytes
from gptedge.runtime.session import Session
from tests.conftest import TEXT

K, N = 64, 8
Run = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


def made(weight: npt.NDArray[np.float32], folder: Path, step: float | None = None) -> list[Run]:
    """x [B, T, K] -> x @ weight.T through the graph that is right everywhere, then the signed one where it is, too."""
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], name="p", transB=1)
    values = Columns.of(weight, step).arrays()
    graph = helper.make_graph(
        [*integer_products.unsigned("columns"), *integer_products.product(node, {n: n for n in values}, {"": "y"})],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, weight.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [*(onnx.numpy_helper.from_array(a, n) for n, a in values.items()), *integer_products.constants()],
    )
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=IR_VERSION)
    integer_products.save(folder / GRAPH, model)
    ort = import_onnxruntime()
    names = [GRAPH, *([signed(GRAPH)] if multiplies_signed_bytes() else [])]
    sessions = [ort.InferenceSession(str(folder / n), providers=["CPUExecutionProvider"]) for n in names]
    return [lambda x, s=s: s.run(None, {"x": x})[0] for s in sessions]


@pytest.mark.parametrize("sign", [1, -1])
def test_it_does_not_saturate(sign: int, tmp_path: Path) -> None:
    """Where sums of signed and unsigned bytes overflow 16 bits without VNNI."""
    scales = np.linspace(0.5, 2, N, dtype=np.float32)
    x = np.full((1, 3, K), 5.0, np.float32)
    x[0, 2] = np.linspace(-5, 5, K)
    for run in made(np.outer(scales, np.full(K, sign * 127.0, np.float32)), tmp_path):
        wanted = np.rint(x / (5 / 127)) * (5 / 127) @ np.full((K, N), sign * 127.0) * scales
        np.testing.assert_allclose(run(x), wanted, rtol=1e-5, atol=1e-2)


def test_a_token_has_its_own_scale(tmp_path: Path) -> None:
    """So it comes out the same alone and among others, a thousand times as large, or zeros; to the last bit."""
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((N, K)).astype(np.float32), rng.standard_normal((2, 5, K)).astype(np.float32)
    x[0, 1], x[1, 3] = 0, 1000 * x[1, 3]
    results = [run(x) for run in made(weight, tmp_path)]
    for run, together in zip(made(weight, tmp_path), results, strict=True):
        np.testing.assert_array_equal(together, results[0])
        for b, t in np.ndindex(2, 5):
            np.testing.assert_array_equal(together[b, t], run(x[b : b + 1, t : t + 1])[0, 0])
    assert not results[0][0, 1].any()
    error = np.linalg.norm(results[0] - x @ weight.T) / np.linalg.norm(x @ weight.T)
    assert 0 < error < 0.01


@pytest.mark.parametrize("step", [0.02, 0.5])
def test_one_step_for_all_tokens(step: float, tmp_path: Path) -> None:
    """What lies beyond its range is cut off; a token comes out the same alone and among others."""
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((N, K)).astype(np.float32), 5 * rng.standard_normal((1, 6, K)).astype(np.float32)
    columns = Columns.of(weight)
    steps = np.clip(np.rint(x / np.float32(step)), -128, 127)
    wanted = steps @ columns.columns.astype(np.float64) * (step * columns.scales)
    for run in made(weight, tmp_path, step):
        got = run(x)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(got[0, 4], run(x[:, 4:5])[0, 0])


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = tmp_path_factory.mktemp("integers") / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return quantize(tiny_bundle, text.parent / "int8", recipe="int8", calibration=text, threads=1).bundle


def test_both_graphs_read_the_same_bytes_and_give_the_same_logits(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, twin = (load_graph(bundle / name) for name in (GRAPH, signed(GRAPH)))
    weights = (model.graph.initializer for model in (plain, twin))
    places = [{t.name: [(e.key, e.value) for e in t.external_data] for t in tensors} for tensors in weights]
    assert places[0] == places[1]
    assert {node.op_type for node in plain.graph.node} - {node.op_type for node in twin.graph.node} == {"BitwiseXor"}
    logits = []
    for exact in (True, False):
        monkeypatch.setattr("gptedge.runtime.session.multiplies_signed_bytes", lambda exact=exact: exact)
        session = Session(open_bundle(bundle), threads=1)
        assert session._fit(GRAPH, "cpu").name == (signed(GRAPH) if exact else GRAPH)
        logits.append(session.run(list(range(40)), session.new_cache(), every_row=True))
    if multiplies_signed_bytes():
        np.testing.assert_array_equal(*logits)


def test_a_row_has_one_scale_and_the_table_blocks(bundle: Path) -> None:
    tensors = {t.name: t for t in load_graph(bundle / GRAPH).graph.initializer}
    assert list(tensors["blocks.0.mlp.down.weight.scales"].dims) == [
        tensors["blocks.0.mlp.down.weight.columns"].dims[1]
    ]
    assert len(tensors["embed.weight.scales"].dims) == 2
    assert (bundle / GRAPH_DATA).stat().st_size == open_bundle(bundle).manifest["files"][GRAPH_DATA]["size"]


def test_the_probe_is_the_product_it_says() -> None:
    """Its bytes, written anew; and a processor that saturates is told from one that does not."""
    kinds = {"a": TensorProto.UINT8, "b": TensorProto.INT8, "y": TensorProto.INT32}
    shapes = {"a": ["m", "k"], "b": ["k", "n"], "y": ["m", "n"]}
    a, b, y = (helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in kinds)
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "product", [a, b], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    assert model.SerializeToString(deterministic=True) == onnx_runtime._PRODUCT


@pytest.mark.parametrize("exact", [True, False])
def test_the_probe_notices_saturation(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Processor:
        """Adds pairs of products as a processor without VNNI does, unless it is exact."""

        def run(self, _: None, feeds: dict[str, npt.NDArray[np.int8]]) -> list[npt.NDArray[np.int32]]:
            a, b = (feeds[name].astype(np.int32) for name in "ab")
            pairs = a[:, 0::2, None] * b[None, 0::2] + a[:, 1::2, None] * b[None, 1::2]
            return [(pairs if exact else np.clip(pairs, -(2**15), 2**15 - 1)).sum(1)]

    monkeypatch.setattr(import_onnxruntime(), "InferenceSession", lambda *_, **__: Processor())
    multiplies_signed_bytes.cache_clear()
    try:
        assert multiplies_signed_bytes() is exact
    finally:
        multiplies_signed_bytes.cache_clear()


def test_where_tokens_share_a_step(bundle: Path) -> None:
    """Where the recipe lets them: neither before queries, keys and values, nor before down projections."""
    roundings = [n for n in load_graph(bundle / GRAPH).graph.node if n.op_type == "QuantizeLinear"]
    static = {n.name.removesuffix(".rounded") for n in roundings if not n.input[0].endswith(".part")}
    assert {name.split(".", 2)[2] for name in static} == {"attn.o", "mlp.gate_up"}


@pytest.mark.parametrize("outlier", [1, 30])
def test_a_token_unlike_the_others_keeps_a_step_of_its_own(outlier: float) -> None:
    """A step that holds it is too coarse for the rest."""
    rng = np.random.default_rng(2)
    weight, x = rng.standard_normal((80, 64)).astype(np.float32), rng.standard_normal((64, 64)).astype(np.float32)
    x[[20, 37, 55]] *= outlier
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], name="p", transB=1)
    group = Group("*", Scheme(8, WHOLE_ROWS, True, 1), smooth=True, static=True)
    target = Target("w", 80, 64, group, (node.name,), ())
    seam = Seam(target, node.name, (("gain", slice(0, 64)),), np.arange(64))
    tensors = [onnx.numpy_helper.from_array(weight, "w")]
    model = helper.make_model(helper.make_graph([node], "one", [], [], tensors))
    walk = SimpleNamespace(inputs_of=lambda _: [x[:32], x[32:]], window=16)
    _, step = _factors(seam, Smoothing(model, onnx.numpy_helper.to_array), cast(Walk, walk))
    assert (step > 0) is (outlier == 1)


def rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    step = np.abs(values).max(1, keepdims=True) / 127
    return np.rint(values / step) * step


def test_least_noise_leaves_less_than_it_was_given() -> None:
    """Activations with a few channels far larger than the rest, in different tokens."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 96)).astype(np.float32)
    x[:, :3] *= 30 * rng.random((300, 3)).astype(np.float32)
    w = rng.standard_normal((80, 96)).astype(np.float32)
    w[:, 50] *= 8
    channels = np.arange(96) // 2  # two columns share a factor, as heads that share values do

    def error(f: npt.NDArray[np.float32]) -> float:
        f = f[channels]
        return float(np.linalg.norm(rounded(x / f) @ rounded(w * f).T - x @ w.T))

    plain, start = np.ones(48, np.float32), np.linspace(0.7, 1.4, 48, dtype=np.float32)
    found = least_noise(x, w, channels, start)
    assert error(found) < 0.6 * error(plain)
    assert error(found) < 0.6 * error(start)
    assert np.log(found).mean() == pytest.approx(0, abs=1e-4)
    np.testing.assert_array_equal(found, least_noise(x, w, channels, start))


@pytest.mark.parametrize("recipe", ["int8", "int8-block"])
def test_activations_that_are_not_finite(
    recipe: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs_of = Walk.inputs_of
    monkeypatch.setattr(Walk, "inputs_of", lambda *a: [x * np.float32(np.nan) for x in inputs_of(*a)])
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(DataError, match=r"reach blocks\.0\.attn\.qkv are not finite on the calibration text"):
        quantize(tiny_bundle, tmp_path / "out", recipe=recipe, calibration=tmp_path / "text.txt", threads=1)
    assert [f.name for f in tmp_path.iterdir()] == ["text.txt"]


def float_mlp(width: int, hidden: int, activation: str) -> onnx.ModelProto:
    """x [B, T, width] -> down(act(gate(x)) * up(x)), as decoders are exported."""
    rng = np.random.default_rng(3)
    shapes = {"mlp.gate_up.weight": (2 * hidden, width), "mlp.down.weight": (width, hidden)}
    tensors = [onnx.numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node(
            "FusedMatMul", ["x", "mlp.gate_up.weight"], ["both"], "mlp.gate_up", domain=MICROSOFT, transB=1
        ),
        helper.make_node("Split", ["both"], ["gate", "up"], "split", axis=-1, num_outputs=2),
        helper.make_node(activation, ["gate"], ["active"], "act"),
        helper.make_node("Mul", ["active", "up"], ["gated"], "gated"),
        helper.make_node("FusedMatMul", ["gated", "mlp.down.weight"], ["y"], "mlp.down", domain=MICROSOFT, transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None, width])
    graph = helper.make_graph(nodes, "mlp", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=IR_VERSION)


def quantized_mlp(model: onnx.ModelProto, matches: str) -> onnx.ModelProto:
    recipe = Recipe("rows", (Group(matches, Scheme(8, WHOLE_ROWS, symmetric=True, steps=1)),))
    made = onnx.ModelProto()
    made.CopyFrom(model)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}

    def store(target: Target) -> dict[str, TensorProto]:
        arrays = arrays_of(target, Columns.of(values[target.weight]))
        return {r: onnx.numpy_helper.from_array(a, f"{target.weight}.{r}") for r, a in arrays.items()}

    rewrite(made, find_targets(made, recipe), store, lambda tensor: tensor)
    return made


def outputs(path: Path, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    session = import_onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("activation", ["Relu", "Tanh"])
def test_gate_and_up_are_products_of_their_own(activation: str, tmp_path: Path) -> None:
    """Nothing is split, up's factor is multiplied in behind down, and the numbers are as without either."""
    x = np.random.default_rng(5).standard_normal((2, 5, 32)).astype(np.float32) / 8
    x[0, 1] = 0
    model = float_mlp(32, 48, activation)
    onnx.save(model, tmp_path / "float.onnx")
    made = quantized_mlp(model, "*")
    onnx.save(made, tmp_path / "plain.onnx")
    integer_products.save(tmp_path / GRAPH, made)
    nodes = load_graph(tmp_path / GRAPH).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("MatMulIntegerToFloat") == 3
    assert "Split" not in kinds
    makers = {output: node for node in nodes for output in node.output}
    assert makers[makers["gated"].input[1]].op_type == "MatMulIntegerToFloat"
    got, plain, wanted = (outputs(tmp_path / name, x) for name in (GRAPH, "plain.onnx", "float.onnx"))
    np.testing.assert_allclose(got, plain, rtol=1e-4, atol=0.02 * wanted.std())
    assert np.abs(got - wanted).max() < 0.15 * wanted.std()
    assert not got[0, 1].any()


@pytest.mark.parametrize("matches", ["*.gate_up.weight", "*.down.weight"])
def test_either_of_them_may_stay_as_it_is(matches: str, tmp_path: Path) -> None:
    x = np.random.default_rng(5).standard_normal((1, 6, 32)).astype(np.float32)
    model = float_mlp(32, 48, "Relu")
    onnx.save(model, tmp_path / "float.onnx")
    integer_products.save(tmp_path / GRAPH, quantized_mlp(model, matches))
    got, wanted = outputs(tmp_path / GRAPH, x), outputs(tmp_path / "float.onnx", x)
    assert np.abs(got - wanted).max() < 0.15 * wanted.std()
