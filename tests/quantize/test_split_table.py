"""Tables in parts: the function stays what it was, and parts have schemes of their own."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper

from gptedge.bundle import GRAPH, open_bundle
from gptedge.errors import UsageError
from gptedge.evaluate.divergence import evaluate, log_softmax
from gptedge.graph_io import LOGITS
from gptedge.onnx_file import load_graph
from gptedge.progress import silent
from gptedge.quantize.mixed import TABLE_SCHEMES, Probe, Roundings, Subject
from gptedge.quantize.passes import find_targets
from gptedge.quantize.quantizer import quantize
from gptedge.quantize.recipes import RECIPES, Group, Recipe, Scheme
from gptedge.quantize.report_weights import weight_errors
from gptedge.quantize.rounding import dequantize
from gptedge.quantize.smooth import smoothed
from gptedge.quantize.split_table import Part, parts_of, split_tables
from gptedge.quantize.walk import Read, Walk
from gptedge.runtime.session import Session
from gptedge.tokenizer import Tokenizer
from tests.conftest import TEXT, tiny_config
from tests.quantize.test_smooth import make

ROWS, COMMON, SPECIAL = 333, 100, (0, 330)
IDS = np.random.default_rng(3).integers(0, ROWS, (2, 60))
EDGES = np.array([[0, COMMON - 1, COMMON, 329, 330, ROWS - 1] * 10])
RECIPE = """
common_tokens = {}

[[group]]
match = "*.rare"
bits = 4
block_size = 16
symmetric = true
method = "gptq"

[[group]]
match = "embed.weight*"
bits = 8
block_size = 32
symmetric = true
smooth = true

[[group]]
match = "*"
bits = 4
block_size = 32
method = "gptq"
"""


def logits(model: onnx.ModelProto, read: Read, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """By the very nodes of the graph, from weights that `read` gives; [tokens, vocabulary]."""
    model = copy.deepcopy(model)
    model.graph.node.append(helper.make_node("Identity", [LOGITS], ["end"], name="end"))
    return np.concatenate(Walk(model, read, ids, threads=1).inputs_of("end"))


def test_what_a_part_costs_is_measured_on_all_logits(tmp_path: Path) -> None:
    """The planner's divergence of a table's parts is that of the whole graph with them rounded."""
    model, read = make(tiny_config(ROWS), tmp_path)
    read = split_tables(model, read, COMMON, SPECIAL)
    parts = [t for t in find_targets(model, RECIPES["mixed"]) if t.lookups]
    with ThreadPoolExecutor(1) as pool:
        subject = Subject(model, read, parts, 1, pool)
        probe = Probe(subject, IDS, Roundings(subject, IDS, silent).probes)
    rows = np.arange(IDS.size).reshape(IDS.shape)[:, IDS.shape[1] // 2 :].ravel()
    before = log_softmax(logits(model, read, IDS).reshape(-1, ROWS)[rows])
    for chosen in ([parts[0]], [parts[1]], parts):
        names = {t.weight for t in chosen}

        def rounded(tensor: onnx.TensorProto, names: set[str] = names) -> npt.NDArray[Any]:
            blocks = probe.rounded[tensor.name] if tensor.name in names else None
            return read(tensor) if blocks is None else dequantize(blocks, TABLE_SCHEMES[0], read(tensor).shape[1])

        after = log_softmax(logits(model, rounded, IDS).reshape(-1, ROWS)[rows])
        expected = float((np.exp(before) * (before - after)).sum(-1).mean())
        assert probe.divergence(chosen) == pytest.approx(expected, rel=1e-3)
        assert expected > 1e-5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    for name, common in (("split", COMMON), ("whole", 5000)):
        (folder / f"{name}.toml").write_text(RECIPE.format(common))
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def split(tiny_bundle: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("split") / "out"
    recipe, text = files / "split.toml", files / "text.txt"
    return quantize(tiny_bundle, out, recipe=str(recipe), calibration=text, prefill="int8", threads=1).bundle


@pytest.mark.parametrize(
    ("common", "special", "expected"),
    [
        (100, (0, 330), [("common", 0, 100), ("rare", 100, 330), ("special", 330, 333)]),
        (100, (0, 50), [("common", 0, 100), ("rare", 100, 333)]),
        (100, (100,), [("common", 0, 100), ("rare", 100, 333)]),  # more would be special than common
        (166, (400,), [("common", 0, 166), ("rare", 166, 333)]),
        (167, (), []),
        (0, (), []),
    ],
)
def test_parts(common: int, special: tuple[int, ...], expected: list[Any]) -> None:
    assert parts_of(ROWS, common, special) == [Part(*part) for part in expected]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"logit_softcap": 5.0}, {"embed_scale": 3.0}])
def test_the_function_stays(changes: dict[str, Any], half: bool, tmp_path: Path) -> None:
    model, read = make(tiny_config(ROWS, **changes), tmp_path, half=half)
    expected = [logits(model, read, ids) for ids in (IDS, EDGES)]
    read = split_tables(model, read, COMMON, SPECIAL)
    names = [t.name for t in model.graph.initializer]
    tables = ("embed.weight", "head.weight") if "tie_embeddings" in changes else ("embed.weight",)
    end = ".half" if half else ""
    for table in tables:
        assert {f"{table}.{part}{end}" for part in ("common", "rare", "special")} < set(names)
        assert f"{table}{end}" not in names
    for ids, before in zip((IDS, EDGES), expected, strict=True):
        np.testing.assert_allclose(logits(model, read, ids), before, atol=1e-5 * np.abs(before).max())


def test_the_parts_of_more_bits_are_smoothed_alone(tmp_path: Path) -> None:
    model, read = make(tiny_config(ROWS), tmp_path)
    before = logits(model, read, IDS)
    read = split_tables(model, read, COMMON, SPECIAL)
    rows = Group("*", Scheme(8, 32, True, 1), smooth=True)
    targets = find_targets(model, Recipe("", (rows,)))
    tables = [t for t in targets if t.weight.startswith("embed")]
    rescaling = smoothed(model, read, Walk(model, read, IDS, threads=1), tables)
    assert set(rescaling.columns) == {"embed.weight.common", "embed.weight.special"}
    after = logits(model, rescaling.read, IDS)
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())


def test_parts_have_schemes_of_their_own(split: Path) -> None:
    nodes = {
        n.name: {a.name: helper.get_attribute_value(a) for a in n.attribute}
        for n in load_graph(split / GRAPH).graph.node
    }
    for part, bits in (("common", 8), ("rare", 4)):
        assert nodes[f"head.{part}"]["bits"] == nodes[f"embed.{part}.blocks"]["bits"] == bits


def test_a_bundle_of_parts_is_smaller_and_near(split: Path, tiny_bundle: Path, files: Path, tmp_path: Path) -> None:
    """Most of this text's tokens have rows of 4 bits. A prompt that the graph for prompts reads is near, too."""
    recipe, text = files / "whole.toml", files / "text.txt"
    whole = quantize(tiny_bundle, tmp_path / "whole", recipe=str(recipe), calibration=text, threads=1).bundle
    sessions = [Session(open_bundle(b), threads=1) for b in (split, whole, tiny_bundle)]
    ids = Tokenizer.from_folder(tiny_bundle).encode(TEXT)
    found = [evaluate(s, ids, reference=sessions[2], context=100, max_windows=4).kl_divergence for s in sessions[:2]]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0]["mean"] < 2.5 * found[1]["mean"]
    assert open_bundle(split).size_bytes < open_bundle(whole).size_bytes
    prompt = (IDS[0].tolist() * 3)[:150]
    rows = [s.prefill(prompt, s.new_cache()) for s in (sessions[0], sessions[2])]
    assert np.corrcoef(rows)[0, 1] > 0.8


def test_a_report_sees_the_whole_table(split: Path, tiny_bundle: Path) -> None:
    (found,) = [e for e in weight_errors(split, tiny_bundle) if e.name == "embed.weight"]
    assert found.stored == "8-bit, blocks of 32; 4-bit, blocks of 16"
    assert found.error is not None
    assert 0.02 < found.error < 0.2


def test_groups_for_parts_that_a_small_table_does_not_have(tiny_bundle: Path, files: Path, tmp_path: Path) -> None:
    """They are no slips of the pen where the recipe would split larger ones; without it, they are."""
    (tmp_path / "large.toml").write_text(RECIPE.format(5000))
    made = quantize(tiny_bundle, tmp_path / "out", recipe=str(tmp_path / "large.toml"), calibration=files / "text.txt")
    assert "embed.weight.packed" in [t.name for t in load_graph(made.bundle / GRAPH).graph.initializer]
    (tmp_path / "none.toml").write_text(RECIPE.format(0))
    with pytest.raises(UsageError, match=r"no weight has a name like \*\.rare"):
        quantize(tiny_bundle, tmp_path / "none", recipe=str(tmp_path / "none.toml"), calibration=files / "text.txt")
