"""Settings of a run: bounds, files, and what presets add."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptedge.errors import UsageError
from gptedge.train.config import TrainConfig
from gptedge.train.describe import markdown, preset_rows, setting_rows
from gptedge.train.finetune_config import FinetuneConfig
from gptedge.train.presets import PRESETS
from gptedge.train.settings import RESUMABLE_CHANGES, LoopConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, r"max_steps is 0; it must be a whole number from 1 to"),
        ({"max_steps": 1.5}, r"max_steps is 1\.5"),
        ({"max_steps": True}, r"max_steps is True"),
        ({"max_seconds": -1}, r"max_seconds is -1; it must be a number from 0\.01"),
        ({"learning_rate": float("nan")}, r"learning_rate is nan"),
        ({"learning_rate": 2}, r"learning_rate is 2; it must be a number from 1e-09 to 1"),
        ({"vocab_size": 256}, r"vocab_size is 256; it must be a whole number from 257"),
        ({"validation_fraction": 0.9}, r"validation_fraction is 0\.9; .* to 0\.5"),
        ({"precision": "fp16"}, r"precision is 'fp16'; it must be one of auto, fp32, bf16"),
        ({"schedule": "linear"}, r"schedule is 'linear'; it must be one of cosine, trapezoid"),
        ({"compile": 1}, r"compile is 1; it must be true or false"),
        ({"dropout": 1}, r"dropout is 1; .* to 0\.9"),
        ({"schedule": ["cosine"]}, r"schedule is \['cosine'\]; it must be one of"),
        ({"preset": ["nano"]}, r"preset is \['nano'\]; it must be one of nano"),
        ({"qat": ["int4"]}, r"qat is \['int4'\]; it must be one of int4, int8"),
        ({"preset": "huge"}, r"preset is 'huge'; it must be one of nano, micro, small, base"),
        ({"n_embd": 100, "n_head": 3}, r"n_embd is 100; it must be a multiple of n_head, 3"),
        ({"n_head": 4, "n_kv_head": 3}, r"n_head 4 is not a multiple of n_kv_head 3"),
        ({"seed": -1}, r"seed is -1"),
    ],
)
def test_values_out_of_bounds_are_refused_with_value_and_bound(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**settings)


def test_toml_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('preset = "micro"\nmax_steps = 7\nlearning_rate = 0.002\n')
    config = TrainConfig.from_toml(path, {"max_steps": 9, "seed": None}, defaults={"preset": "base", "max_steps": 1})
    assert (config.preset, config.max_steps, config.learning_rate, config.seed) == ("micro", 9, 0.002, 0)
    assert TrainConfig.from_dict(config.to_dict(), where="here") == config


def test_a_whole_number_is_a_float_where_one_is_meant(tmp_path: Path) -> None:
    """torch refuses betas of two kinds."""
    (tmp_path / "run.toml").write_text("beta1 = 0\nlearning_rate = 1\nmax_seconds = 60\nmax_steps = 7\n")
    config = TrainConfig.from_toml(tmp_path / "run.toml")
    values = [config.beta1, config.learning_rate, config.max_seconds, config.max_steps, config.recipe.learning_rate]
    assert [type(value) for value in values] == [float, float, float, int, float]
    assert FinetuneConfig(epochs=3, lora_alpha=16).to_dict() == FinetuneConfig().to_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step = 7", r"run\.toml: 'max_step' is not a setting; did you mean 'max_steps'\?"),
        ("[model]\nn_layer = 2", r"'model' is not a setting"),
        ("max_steps = ", r"run\.toml cannot be read"),
        ("max_steps = 'many'", r"max_steps is 'many'"),
    ],
)
def test_a_broken_toml_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        TrainConfig.from_toml(path)


def test_missing_toml_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml cannot be read"):
        TrainConfig.from_toml(tmp_path / "none.toml")


def test_what_is_set_replaces_the_presets() -> None:
    assert TrainConfig().recipe == PRESETS["nano"]
    recipe = TrainConfig(preset="micro", n_layer=3, learning_rate=0.5).recipe
    assert (recipe.n_layer, recipe.learning_rate, recipe.n_embd) == (3, 0.5, PRESETS["micro"].n_embd)


def test_the_number_of_steps() -> None:
    assert TrainConfig().step_limit == PRESETS["nano"].max_steps
    assert TrainConfig(max_steps=5).step_limit == 5
    assert TrainConfig(max_seconds=5).step_limit is None
    assert TrainConfig(max_seconds=5, max_steps=6).step_limit == 6


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_llamas_that_quantize_in_whole_blocks(name: str) -> None:
    preset = PRESETS[name]
    model = preset.model(vocab_size=preset.vocab_size)
    assert model.head_dim in (32, 64)
    assert [n % 64 for n in (model.n_embd, model.n_ff, model.q_size, model.kv_size)] == [0, 0, 0, 0]
    assert model.n_kv_head < model.n_head
    assert model.tie_embeddings


def test_presets_grow() -> None:
    sizes = [preset.parameters for preset in PRESETS.values()]
    assert sizes == sorted(sizes)
    assert 2_000_000 < sizes[0] < 6_000_000
    assert sizes[-1] > 80_000_000


def test_the_settings_need_no_torch() -> None:
    """The command line reads them for its help."""
    code = "import sys, gptedge.train.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# ---- what is written about them ------------------------------------------------------------------------------------


def test_docs_hold_the_tables_of_settings_and_presets() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert markdown(setting_rows(TrainConfig)) in page
    assert markdown(setting_rows(FinetuneConfig)) in page
    assert markdown(preset_rows()) in page


@pytest.mark.parametrize("kind", [TrainConfig, FinetuneConfig])
def test_every_setting_is_described(kind: type[LoopConfig]) -> None:
    for name, default, _bounds, what in setting_rows(kind)[1:]:
        assert len(what) > 10, name
        assert default


def test_docs_name_what_may_change_when_a_run_is_resumed() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (said,) = [part for part in page.split("\n\n") if "may be given anew" in part]
    named = set(re.findall(r"`(\w+)`", said.partition("may be given anew")[0]))
    assert named == RESUMABLE_CHANGES
