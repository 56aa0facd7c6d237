"""Checkpoints: folders in Hugging Face's format, opened without torch and without loading the weights.

    config.json  model.safetensors | model.safetensors.index.json + shards
    tokenizer.json  tokenizer_config.json  generation_config.json  chat_template.jinja

Other sources (GGUF, …) are turned into the same `Checkpoint`, so that everything after this point sees one format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptedge import safetensors
from gptedge.config import ModelConfig
from gptedge.errors import CheckpointError, UsageError
from gptedge.families import Family, checkpoint_name, family_of, hf_config, source_tensors
from gptedge.files import write_json
from gptedge.safetensors import Tensor

CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG, CHAT_TEMPLATE = "generation_config.json", "chat_template.jinja"
# Files that travel from a checkpoint to a bundle byte for byte.
SIDE_FILES = (TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE)


@dataclass(frozen=True)
class Checkpoint:
    """A model as its publisher named things, plus what gptedge makes of it."""

    path: Path
    hf_config: dict[str, Any]
    """config.json."""
    tensors: Mapping[str, Tensor]
    """By the publisher's names."""
    side_files: Mapping[str, bytes] = field(default_factory=dict)
    """Contents of those of SIDE_FILES that there are."""
    is_gguf: bool = False
    """Tensors have llama.cpp's names rather than the publisher's own."""

    @property
    def family(self) -> Family:
        return family_of(self.hf_config)

    @property
    def config(self) -> ModelConfig:
        try:
            return self.family.config(self.hf_config)
        except UsageError as e:  # as where a person makes a configuration
            raise CheckpointError(f"{self.path}: {e}") from None

    def weights(self) -> dict[str, Tensor]:
        """Tensors by gptedge's names (see `families`). Raises CheckpointError for missing, misshapen or unused ones."""
        naming = self.family.gguf if self.is_gguf else self.family.files
        assert naming is not None, "only families that llama.cpp has are opened from its files"
        return source_tensors(naming, self.config, self.tensors, str(self.path))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a Hugging Face folder. Raises CheckpointError when something is missing or broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {folder} does not exist" if not folder.exists() else f"{folder} is not a folder"
        )
    config = read_json_object(folder / CONFIG)
    side_files = {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}
    return Checkpoint(folder, config, _open_weights(folder), side_files)


def _open_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        return safetensors.read(folder / WEIGHTS)
    if not (folder / WEIGHTS_INDEX).is_file():
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    where = read_json_object(folder / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(where, dict):
        raise CheckpointError(f"{folder / WEIGHTS_INDEX} has no weight_map")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, where.values()))):
        if Path(shard).name != shard:
            raise CheckpointError(f"{folder / WEIGHTS_INDEX} names the shard {shard!r}, which lies outside the folder")
        tensors |= safetensors.read(folder / shard)
    if missing := sorted(set(where) - set(tensors)):
        raise CheckpointError(f"{folder}: the index promises {missing[0]}, and no shard holds it ({len(missing)} such)")
    return tensors


def weights_id(weights: Mapping[str, Tensor]) -> str:
    """What tells a model's weights from others', in hex: of each tensor the shape, and three rows as float32.

    It reads little of a large file, and whatever a file calls the tensors, or stores them as exactly, it is the same.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tensor.shape} ".encode())
        last = tensor.shape[0] - 1
        digest.update(np.ascontiguousarray(tensor.take([0, last // 2, last]), "<f4").tobytes())
    return digest.hexdigest()


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, npt.NDArray[np.float32]],
    side_files: Mapping[str, bytes],
    *,
    token_ids: Mapping[str, int] | None = None,
) -> None:
    """Write a Llama-shaped model, its weights by gptedge's names, into an existing folder (see `files.new_folder`).

    `token_ids` holds `bos_token_id`, `eos_token_id` and the like, for config.json and generation_config.json.
    """
    ids = dict(token_ids or {})
    write_json(folder / CONFIG, hf_config(config) | ids)
    write_json(folder / GENERATION_CONFIG, ids)
    for name, content in side_files.items():
        (folder / name).write_bytes(content)
    safetensors.write(folder / WEIGHTS, {checkpoint_name(name): array for name, array in weights.items()})


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is missing or something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value
