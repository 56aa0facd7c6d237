"""Filling a size: bytes go where they save most, and the bundle keeps to its target."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from gptedge.bundle import open_bundle
from gptedge.errors import UsageError
from gptedge.onnx_file import load_graph, read_initializer
from gptedge.progress import silent
from gptedge.quantize.calibrated import Calibrator
from gptedge.quantize.mixed import SCHEMES, Choice, Roundings, Subject, allocate, plan, smallest
from gptedge.quantize.passes import find_targets
from gptedge.quantize.quantizer import quantize
from gptedge.quantize.recipes import RECIPES, read_recipe
from gptedge.quantize.rounding import dequantize, quantize_matrix
from gptedge.quantize.walk import Walk
from tests.conftest import tiny_config
from tests.quantize.test_smooth import make

SMALL, MIDDLE, LARGE = SCHEMES[0], SCHEMES[1], SCHEMES[2]
ROW = [Choice(SMALL, 100, 8.0), Choice(MIDDLE, 150, 5.0), Choice(LARGE, 200, 1.0)]


def scaled(factor: float) -> list[Choice]:
    return [Choice(c.scheme, c.size, c.cost * factor) for c in ROW]


def test_bytes_go_where_they_save_most() -> None:
    choices = {"dull": scaled(0.1), "sharp": scaled(10), "plain": scaled(1)}
    assert [c.size for c in allocate(choices, 300).values()] == [100, 100, 100]
    assert {n: c.size for n, c in allocate(choices, 400).items()} == {"dull": 100, "sharp": 200, "plain": 100}
    assert {n: c.size for n, c in allocate(choices, 599).items()} == {"dull": 100, "sharp": 200, "plain": 200}
    assert [c.size for c in allocate(choices, 600).values()] == [200, 200, 200]


def test_a_choice_that_is_not_worth_its_bytes_is_never_taken() -> None:
    """150 bytes save less each than 200 do, so it is skipped; 220 that are no better than 200, too."""
    row = [*ROW, Choice(LARGE, 220, 1.0)]
    sizes = {allocate({"a": row}, budget)["a"].size for budget in range(100, 400, 10)}
    assert sizes == {100, 200}


def test_a_large_step_is_worth_small_ones() -> None:
    """By what a byte saves the small ones would come first, and leave too few bytes for the large one."""
    small = [Choice(SMALL, 100, 2.0), Choice(LARGE, 110, 1.0)]
    table = [Choice(SMALL, 500, 50.0), Choice(LARGE, 1000, 10.0)]
    chosen = allocate({"a": small, "b": small, "table": table}, 1205)
    assert {name: c.size for name, c in chosen.items()} == {"a": 100, "b": 100, "table": 1000}


def test_more_bytes_never_cost_more() -> None:
    rng = np.random.default_rng(0)
    choices = {
        str(i): [Choice(SMALL, int(s), float(c)) for s, c in zip(rng.integers(10, 99, 5), rng.random(5), strict=True)]
        for i in range(20)
    }
    least = sum(min(c.size for c in row) for row in choices.values())
    costs = [sum(c.cost for c in allocate(choices, b).values()) for b in range(least, 3 * least, least // 10)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_a_bundle_keeps_to_its_target(tiny_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. 0123456789 " * 200)
    kinds = {}
    for target in (0.24, 0.30):
        made = quantize(tiny_bundle, tmp_path / str(target), recipe="mixed", target_mb=target, calibration=text)
        assert 0.7 * target < made.size_mb <= target  # much of so small a bundle is padding, kept in reserve
        assert open_bundle(made.bundle).recipe == "mixed"
        graph = onnx.load(made.bundle / "model.onnx", load_external_data=False).graph
        nodes = [n for n in graph.node if n.op_type == "MatMulNBits"]
        kinds[target] = Counter(tuple(a.i for a in n.attribute if a.name in ("bits", "block_size")) for n in nodes)
    assert kinds[0.24] != kinds[0.30]


def test_costs_fall_with_bits_and_with_smaller_blocks(tiny_bundle: Path) -> None:
    """As measured on the text; the first scheme costs what it was said to, and what its activations lose."""
    model = load_graph(tiny_bundle / "model.onnx")
    targets = [t for t in find_targets(model, RECIPES["mixed"]) if not t.lookups]
    ids = np.random.default_rng(0).integers(0, 300, (2, 60))
    read = partial(read_initializer, folder=tiny_bundle)
    with ThreadPoolExecutor(1) as pool:
        roundings = Roundings(Subject(model, read, targets, 1, pool), ids, silent)
    for target in targets:
        costs = {c.scheme: c.cost for c in roundings.choices(target, 7.0)}
        cost = {(s.bits, s.block_size): c for s, c in costs.items() if s.symmetric == (s.bits == 8)}
        assert all(costs[replace(s, symmetric=False)] < c for s, c in costs.items() if s.symmetric and s.bits == 4)
        assert 7 < cost[4, 32] < 7.5
        assert cost[4, 128] >= cost[4, 64] >= cost[4, 32] > cost[4, 16] > 10 * cost[8, 64] > 0


def test_tables_that_are_not_the_head(tmp_path: Path) -> None:
    """The head is rounded as any product's weight is; what is only looked up has errors, too."""
    model, read = make(tiny_config(333, tie_embeddings=False), tmp_path)
    targets = find_targets(model, RECIPES["mixed"])
    ids = np.random.default_rng(0).integers(0, 300, (2, 60))
    with ThreadPoolExecutor(1) as pool:
        subject = Subject(model, read, targets, 1, pool)
        least, most = (plan(subject, ids, budget, silent) for budget in (smallest(targets), 10**9))
    for recipe, bits in ((least, 4), (most, 8)):
        assert [g.match for g in recipe.groups] == [t.weight for t in targets]
        assert {g.match: g.scheme.bits for g in recipe.groups}.items() >= {
            "embed.weight": bits,
            "head.weight": bits,
        }.items()


TABLE = '[[group]]\nmatch = "embed.weight"\nbits = 4\nblock_size = 32\nsymmetric = true\nmethod = "{}"\n'


def test_a_table_that_is_the_head_can_be_calibrated(tiny_bundle: Path, tmp_path: Path) -> None:
    """Its product's outputs change less, on text of the same kind, than with plain rounding."""
    (tmp_path / "table.toml").write_text(TABLE.format("gptq"))
    model, read = load_graph(tiny_bundle / "model.onnx"), partial(read_initializer, folder=tiny_bundle)
    (target,) = find_targets(model, read_recipe(tmp_path / "table.toml"))
    rows = read(next(t for t in model.graph.initializer if t.name == target.weight))
    text = np.random.default_rng(0).integers(0, 40, (8, 100))
    x = np.concatenate(Walk(model, read, text[4:], threads=1).inputs_of("head"))
    with ThreadPoolExecutor(1) as pool:
        calibrator = Calibrator(model, read, text[:4], token_weights={}, threads=1, pool=pool)
        made = (calibrator.quantize(target, rows), quantize_matrix(rows, target.scheme, None, pool))
    calibrated, plain = (np.square(x @ (rows - dequantize(b, target.scheme, target.width)).T).sum() for b in made)
    assert calibrated < 0.9 * plain


def test_a_table_that_is_only_looked_up_cannot(tmp_path: Path) -> None:
    model, _ = make(tiny_config(333, tie_embeddings=False), tmp_path)
    (tmp_path / "table.toml").write_text(TABLE.format("gptq"))
    (target,) = find_targets(model, read_recipe(tmp_path / "table.toml"))
    assert (target.weight, target.group.method, target.is_calibrated) == ("embed.weight", "gptq", False)


def test_a_target_that_cannot_be_reached(tiny_bundle: Path, tmp_path: Path) -> None:
    """It says the smallest that can, before it writes any text; and that one is reached."""
    begun: list[str] = []
    with pytest.raises(UsageError, match=r"a target size of 0\.05 MB cannot be reached; the smallest is") as refused:
        quantize(tiny_bundle, tmp_path / "a", recipe="mixed", target_mb=0.05, report=lambda *a: begun.append(a[2]))
    assert not begun
    smallest = float(str(refused.value).split()[-2])
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. 0123456789 " * 200)
    assert (
        quantize(tiny_bundle, tmp_path / "b", recipe="mixed", target_mb=smallest, calibration=text).size_mb <= smallest
    )
    for wrong in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(UsageError, match=r"target_mb is .*; give a size in MB, above 0"):
            quantize(tiny_bundle, tmp_path / "c", recipe="mixed", target_mb=wrong)
