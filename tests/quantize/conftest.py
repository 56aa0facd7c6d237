"""Bundles of one model, side by side in a folder, and a report's data of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import TEXT

if TYPE_CHECKING:
    from gptedge.quantize.report import ReportData

RECIPES = ("int8-weight", "int4-rtn")


@pytest.fixture(scope="session")
def bundles(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three bundles, a training run, and other things that are neither."""
    folder = tmp_path_factory.mktemp("bundles")
    shutil.copytree(tiny_bundle, folder / "a & <b>")
    from gptedge.quantize.quantizer import quantize

    for recipe in RECIPES:
        quantize(tiny_bundle, folder / recipe, recipe=recipe, threads=1)
    (folder / "run").mkdir()
    lines = [
        {
            "step": i,
            "loss": 5 - i / 500,
            "val_loss": 4.5 if i == 900 else None,
            "learning_rate": 1e-3,
            "grad_norm": i / 9,
        }
        for i in range(1, 901)
    ]
    (folder / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "empty").mkdir()
    (folder / "notes.txt").touch()
    return folder


@pytest.fixture(scope="session")
def measured(bundles: Path) -> ReportData:
    from gptedge.quantize.report import collect

    return collect([bundles], text=TEXT, text_name="text.txt", context=64, max_windows=4, threads=1)
