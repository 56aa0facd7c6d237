"""LoRA adapters with random updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gptedge.checkpoint import Checkpoint, weights_id
from gptedge.family_files import write_like
from gptedge.lora_files import Adapter, LowRankUpdate, write_adapter

TARGETS = ("attn.q", "attn.v", "attn.o", "mlp.up", "mlp.down")  # parts of what graphs fuse


def write_random(checkpoint: Checkpoint, folder: Path, seed: int) -> Path:
    """An adapter of random updates, and beside it the whole model with them, NAME-merged."""
    draw, weights = np.random.default_rng(seed), {n: np.array(t.read()) for n, t in checkpoint.weights().items()}
    updates = {}
    for i in range(checkpoint.config.n_layer):
        for target in TARGETS:
            weight = weights[f"blocks.{i}.{target}.weight"]
            a, b = (draw.normal(0, 0.2, shape).astype(np.float32) for shape in ((3, weight.shape[1]), (len(weight), 3)))
            updates[f"blocks.{i}.{target}"] = LowRankUpdate(a, b, 0.5)
            weights[f"blocks.{i}.{target}.weight"] = weight + 0.5 * b @ a
    folder.mkdir()
    adapter = Adapter(updates, weights_id(checkpoint.weights()))
    write_adapter(folder, adapter, checkpoint.family.files, checkpoint.config, base_name="base")
    merged = folder.with_name(f"{folder.name}-merged")
    merged.mkdir()
    write_like(merged, checkpoint, weights, checkpoint.side_files)
    return folder
