"""Recipes from TOML files, and what is refused in them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from gptedge.bundle import open_bundle
from gptedge.errors import UsageError
from gptedge.quantize.quantizer import quantize
from gptedge.quantize.recipes import RECIPES, Group, Recipe, Scheme, find_recipe, read_recipe
from gptedge.runtime.session import Session

GOOD = """
summary = "down projections alone"
[[group]]
match = "*.down.weight"
bits = 4
block_size = 16
"""


ROWS = GOOD.replace("4", "8").replace("16", "0") + "symmetric = true\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_a_recipe_of_ones_own(tiny_bundle: Path, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    result = quantize(tiny_bundle, tmp_path / "out", recipe=str(path))
    assert result.recipe == "mine"
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    quantized = [n.name for n in graph.node if n.op_type == "MatMulNBits"]
    assert quantized == [f"blocks.{i}.mlp.down" for i in range(3)]
    assert any(n.op_type == "FusedMatMul" for n in graph.node)


def test_fields_and_defaults(tmp_path: Path) -> None:
    name, recipe = find_recipe(str(write(tmp_path, GOOD)))
    assert (name, recipe.summary) == ("mine", "down projections alone")
    group = recipe.group_of("blocks.11.mlp.down.weight")
    assert group is not None
    assert group.scheme == Scheme(bits=4, block_size=16, symmetric=False, steps=12)
    assert (group.method, group.smooth, group.widen) == ("rtn", False, False)
    assert recipe.group_of("embed.weight") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no \[\[group\]\]"),
        ("= 3", "is not TOML"),
        ("sumary = 'x'\n" + GOOD, "'sumary' is not known"),
        ("distill_steps = -1\n" + GOOD, "distill_steps is -1; it must be of type int, at least 0"),
        ("calibration_windows = true\n" + GOOD, "calibration_windows is True; it must be of type int, at least 1"),
        ("weigh_tokens = 1\n" + GOOD, "weigh_tokens is 1; it must be of type bool"),
        (GOOD + "bit = 4", "'bit' is not known; known are match, "),
        (GOOD.replace("bits = 4\n", ""), "lacks bits"),
        (GOOD.replace("4", "3", 1), "bits is 3; it must be 4 or 8"),
        (GOOD.replace("16", "24"), "block_size is 24; it must be one of 16, 32, 64, 128, 256"),
        (GOOD.replace("16", "'16'"), "block_size is '16'; it must be of type int"),
        (GOOD.replace("16", "24"), "or 0 for whole rows"),
        (GOOD.replace("16", "0"), "block_size 0, whole rows, takes 8 bits and symmetric = true"),
        (ROWS.replace("true", "false"), "block_size 0, whole rows, takes 8 bits and symmetric = true"),
        (ROWS + "widen = true", "whole rows .* are not widened"),
        ("distill_steps = 9\n" + ROWS + GOOD[GOOD.index("[[") :], "distill_steps takes no weights in whole rows"),
        (GOOD + "method = 'awq'", "method is 'awq'; it must be one of rtn, gptq"),
        (GOOD + "first_token = -1", "first_token is -1; it must be at least 0"),
        (GOOD + "widen = true", "must be of 8 bits and symmetric"),
        ("group = ['x']", r"group is 'x'; each begins with a line \[\[group\]\]"),
        ("distill_steps = 9\n" + GOOD + "symmetric = true", "no group is such"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_recipe(write(tmp_path, text))


def test_tables_must_be_symmetric(tiny_bundle: Path, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("*.down.weight", "*"))
    with pytest.raises(UsageError, match=r"embed\.weight is looked up by rows: its scheme must be symmetric"):
        quantize(tiny_bundle, tmp_path / "out", recipe=str(path))
    assert [f.name for f in tmp_path.iterdir()] == ["mine.toml"]


def test_a_table_takes_no_whole_rows(tiny_bundle: Path, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS.replace("*.down.weight", "*"))
    with pytest.raises(UsageError, match=r"embed\.weight is looked up by rows: its block_size must not be 0"):
        quantize(tiny_bundle, tmp_path / "out", recipe=str(path))


def test_whole_rows_beside_calibrated_weights(tiny_bundle: Path, tmp_path: Path) -> None:
    """What is calibrated later sees the products of integers that stand before it."""
    gptq = GOOD.replace("down", "o") + "method = 'gptq'\n"
    path = write(tmp_path, ROWS + gptq[gptq.index("[[") :])
    quantize(tiny_bundle, tmp_path / "out", recipe=str(path), threads=1)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    kinds = {n.op_type: n.name for n in graph.node if "blocks.2." in n.name}
    assert kinds["MatMulIntegerToFloat"] == "blocks.2.mlp.down.product"
    assert kinds["MatMulNBits"] == "blocks.2.attn.o"
    session = Session(open_bundle(tmp_path / "out"), threads=1)
    assert np.isfinite(session.run([1, 2, 3], session.new_cache())).all()


def test_a_group_that_matches_nothing_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + GOOD[GOOD.index("[[") :].replace("down", "dwon"))
    with pytest.raises(
        UsageError, match=r"no weight has a name like \*\.dwon\.weight; the bundle has embed\.weight, blocks\.\*"
    ):
        quantize(tiny_bundle, tmp_path / "out", recipe=str(path))


def test_a_file_cannot_take_the_name_of_what_there_is(tmp_path: Path) -> None:
    """Or its bundle would pass for another: for a float one, that may be quantized."""
    for name in ("fp32", "int8"):
        (tmp_path / f"{name}.toml").write_text(GOOD)
        with pytest.raises(UsageError, match=f"{name} is the name of a recipe that gptedge has"):
            find_recipe(str(tmp_path / f"{name}.toml"))


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(UsageError, match="did you mean int4-rtn"):
        find_recipe("int4_rtn")


def test_a_target_size_is_for_recipes_that_fill_it(tiny_bundle: Path, tmp_path: Path) -> None:
    for name, recipe in RECIPES.items():
        with pytest.raises(UsageError, match="target size"):
            quantize(tiny_bundle, tmp_path / "out", recipe=name, target_mb=None if recipe.fills_target else 1.0)


# ---- what is written about them ------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_every_key_is_described() -> None:
    rows = dict(re.findall(r"^\| (\w+) \|([^|]*)\|", PAGE, re.M))
    fields = {f.name: f.default for c in (Recipe, Group, Scheme) for f in dataclasses.fields(c)}
    hidden = {"groups", "scheme", "fills_target"}
    assert set(rows) - {"key"} == set(fields) - hidden
    for name in ("calibration_windows", "weigh_tokens", "distill_steps", "method", "smooth", "equalize", "first_token"):
        assert rows[name].strip() == str(fields[name]).lower(), name


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not recipe.fills_target])
def test_recipes_on_the_page_are_those_that_come_along(name: str, tmp_path: Path) -> None:
    files = dict(re.findall(r"^(\S+?)[:;][^\n]*\n\n```toml\n(.*?)```", PAGE, re.M | re.S))
    recipe = read_recipe(write(tmp_path, files[name]))
    assert dataclasses.replace(recipe, summary=RECIPES[name].summary) == RECIPES[name]
