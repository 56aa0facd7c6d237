"""Rescaling leaves a model's function as it was, and hardly a weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import reference_model

from gptedge.checkpoint import open_checkpoint
from gptedge.export.reference import Reference
from gptedge.export.sources import open_source


def test_rescaling_keeps_the_function(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint)
    weights = {name: tensor.read().copy() for name, tensor in source.tensors.items()}
    before = {name: array.copy() for name, array in weights.items()}
    reference_model.rescale(weights, source.hf_config, seed=3)
    kept = {name for name in weights if np.array_equal(weights[name], before[name])}
    assert kept == {"model.embed_tokens.weight", "model.norm.weight"}
    for name in set(weights) - kept:
        ratio = weights[name] / before[name]
        assert np.abs(np.log(ratio)).max() < 2.01 * reference_model.SPREAD, name  # rows and columns may both change
        assert ratio.std() > 0.05, name

    reference_model.write_folder(tmp_path / "rescaled", source, weights)
    rescaled = open_source(tmp_path / "rescaled")
    ids = [5, 17, 300, 2, 90, 41]
    theirs = Reference(source.config, source.weights()).logits(ids)
    ours = Reference(rescaled.config, rescaled.weights()).logits(ids)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
