"""The way back: weights by gptedge's names laid out, named and described as a family's own files have them.

`families.source_tensors` reads what this writes. Layouts are those of the publisher's files, never GGUF's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptedge import safetensors
from gptedge.checkpoint import CONFIG, WEIGHTS, Checkpoint
from gptedge.config import ModelConfig
from gptedge.families import family_of, part_of, span, tensor_shapes
from gptedge.files import write_json
from gptedge.safetensors import FloatArray
from gptedge.tensor_names import Naming, Part

_AS_GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}


def write_like(
    folder: Path, checkpoint: Checkpoint, weights: Mapping[str, FloatArray], side_files: Mapping[str, bytes]
) -> None:
    """Write a float32 checkpoint of the family of `checkpoint` into an existing folder (see `files.new_folder`)."""
    config = published_config(checkpoint)
    family = family_of(config)
    write_json(folder / CONFIG, config)
    for name, content in side_files.items():
        (folder / name).write_bytes(content)
    safetensors.write(folder / WEIGHTS, stored_tensors(family.files, family.config(config), weights))


def published_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of the model with float32 weights. Nobody has a class for nanoGPT's: it becomes a GPT-2."""
    config = {k: v for k, v in checkpoint.hf_config.items() if k not in ("dtype", "quantization_config")}
    if checkpoint.family.name == "nanogpt":
        config = {**config, **_AS_GPT2, "bias": True}
    return config | {"torch_dtype": "float32"}


def stored_tensors(naming: Naming, c: ModelConfig, weights: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """All of a model's weights by the publisher's names. A bias that `weights` lacks is written as zeros."""
    stored: dict[str, FloatArray] = {}
    transposed = set[str]()
    for name, shape in tensor_shapes(c).items():
        part, _ = part_of(naming, name)
        if not part.name:
            continue
        key = stored_name(naming, name)
        assert name in weights or name.endswith(".bias"), name
        rows = weights[name] - np.float32(part.plus) if name in weights else np.zeros(shape, np.float32)
        if part.rows:
            stored.setdefault(key, np.zeros((span(part.rows, c)[2], *shape[1:]), np.float32))
            place_rows(stored[key], part, c, rows)
        else:
            stored[key] = rows
        if part.transpose and len(shape) == 2:
            transposed.add(key)
    return {name: array.T if name in transposed else array for name, array in stored.items()}


def stored_name(naming: Naming, name: str) -> str:
    """What the publisher's files call the tensor that holds ours."""
    part, layer = part_of(naming, name)
    return naming.prefixes[0] + part.name.format(i=layer)


def is_stored(naming: Naming, name: str) -> bool:
    """Whether the files hold one of our tensors; what they do not hold cannot be trained."""
    return bool(part_of(naming, name)[0].name)


def place_rows(whole: FloatArray, part: Part, c: ModelConfig, rows: FloatArray) -> None:
    """Put a part's rows where they belong among those of its fused matrix [rows of all, …]."""
    first, count, total = span(part.rows, c)
    heads = c.n_head if part.per_head else 1
    each = whole.reshape(heads, total // heads, *whole.shape[1:])
    each[:, first // heads : (first + count) // heads] = rows.reshape(heads, count // heads, *rows.shape[1:])


def take_rows(whole: FloatArray, part: Part, c: ModelConfig) -> FloatArray:
    """A part's rows among those of its fused matrix, or all of one that is not fused."""
    if not part.rows:
        return whole
    first, count, total = span(part.rows, c)
    heads = c.n_head if part.per_head else 1
    each = whole.reshape(heads, total // heads, *whole.shape[1:])
    return each[:, first // heads : (first + count) // heads].reshape(count, *whole.shape[1:])
