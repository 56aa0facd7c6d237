"""Training from scratch with rounded weights: quantizing the outcome changes nothing, and stopping loses nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptedge.checkpoint import open_checkpoint
from gptedge.errors import UsageError
from gptedge.evaluate.divergence import Evaluation, score, summarize
from gptedge.export.exporter import export
from gptedge.loading import load
from gptedge.quantize.quantizer import quantize
from gptedge.train.config import TrainConfig
from gptedge.train.run import run_training
from gptedge.train.settings import QAT_RECIPES
from tests.train.test_qat import bundle_weights, joined
from tests.train.test_run import Crash, crash_at, outcome


@pytest.fixture
def rounded(tiny: TrainConfig) -> TrainConfig:
    return replace(tiny, qat="int4")


def quantized(checkpoint: Path, folder: Path, text: Path, recipe: str) -> Evaluation:
    """What the quantized bundle says of a text, against the fp32 one."""
    source = export(checkpoint, folder / "fp32").bundle
    small = quantize(source, folder / "small", recipe=recipe, threads=1).bundle
    with load(source, threads=1) as original, load(small, threads=1) as model:
        ids = original.tokenizer.encode(text.read_text(encoding="utf-8"))
        return summarize(score(model.session, ids, reference=original.session, context=16))


@pytest.mark.parametrize("qat", QAT_RECIPES)
def test_quantizing_what_was_trained_rounded_costs_nothing(
    qat: str, texts: Path, rounded: TrainConfig, tmp_path: Path
) -> None:
    """The tiny model loses little however it is rounded, so its weights, not perplexity, tell what was written."""
    result = run_training([texts], tmp_path / "m", config=replace(rounded, qat=qat))
    assert result.val_loss is not None
    assert result.val_loss < 3.2  # 3.0 without rounding; 3.6 where scales do not follow the weights
    found = quantized(tmp_path / "m", tmp_path, texts / "00.txt", QAT_RECIPES[qat])
    assert found.ppl_increase is not None
    assert abs(found.ppl_increase) < 0.01
    written = open_checkpoint(tmp_path / "m").weights()
    trained = {name: np.asarray(weight.read()) for name, weight in written.items()}
    for name, values in bundle_weights(tmp_path / "fp32", tmp_path / "small", QAT_RECIPES[qat]).items():
        np.testing.assert_array_equal(values, joined(trained, name), err_msg=name)


def test_a_rounded_run_goes_on_to_the_same_bytes(texts: Path, rounded: TrainConfig, tmp_path: Path) -> None:
    run_training([texts], tmp_path / "whole", config=rounded)
    with pytest.raises(Crash):
        run_training([texts], tmp_path / "m", config=rounded, on_step=crash_at(13))
    run_training([texts], tmp_path / "m", config=rounded, resume=True)
    assert outcome(tmp_path / "m") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(("shard", "world"), [(True, "1"), (False, "2")])
def test_several_processes_are_refused(
    shard: bool, world: str, texts: Path, rounded: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UsageError, match="--qat int4 trains in one process; leave out --shard"):
        run_training([texts], tmp_path / "m", config=rounded, shard=shard)
    assert not (tmp_path / "m").exists()


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(UsageError, match="qat is 'int2'; it must be one of int4, int8"):
        TrainConfig(qat="int2")
