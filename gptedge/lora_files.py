"""LoRA adapters (arXiv:2106.09685) in the files of Hugging Face's PEFT, written and read with numpy alone.

    adapter_config.json          rank, alpha, which modules of which model
    adapter_model.safetensors    base_model.model.{module}.lora_A.weight [rank, in], .lora_B.weight [out, rank]

Modules have the publisher's names. Where a family fuses matrices (q, k and v in one), the updates of the parts become
one of a rank as large as theirs together: the A's stacked, the B's side by side, each in its own rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptedge import safetensors
from gptedge.checkpoint import read_json_object
from gptedge.config import ModelConfig
from gptedge.errors import CheckpointError, UnsupportedModelError
from gptedge.families import part_of, span, tensor_shapes
from gptedge.family_files import place_rows, stored_name, take_rows
from gptedge.files import write_json
from gptedge.safetensors import FloatArray
from gptedge.tensor_names import Naming

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_BASE = "base_weights"
"""In the weights' metadata, which others leave alone: what the adapter was trained on, see `checkpoint.weights_id`."""

# Settings of PEFT under which an adapter is more than A and B, with the value that says it is not.
_PLAIN = {
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "lora_bias": False,
}


@dataclass(frozen=True)
class LowRankUpdate:
    """scale * b @ a is added to a weight [out, in]."""

    a: FloatArray
    """[rank, in]"""
    b: FloatArray
    """[out, rank]"""
    scale: float


@dataclass(frozen=True)
class Adapter:
    updates: Mapping[str, LowRankUpdate]
    """By gptedge's names of linear layers: blocks.0.attn.q, …"""
    base: str | None
    """`checkpoint.weights_id` of the model it was trained on, where the file says it."""


# ---- writing -------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, adapter: Adapter, naming: Naming, c: ModelConfig, *, base_name: str) -> None:
    """Write both files into an existing folder; `base_name` is what PEFT is to load the model from."""
    modules = _fused(adapter.updates, naming, c)
    ranks = {module: len(u.a) for module, u in modules.items()}
    rank = min(ranks.values())
    scale = next(iter(modules.values())).scale
    kinds = sorted({_kind(module) for module in modules})
    larger = {_kind(module): r for module, r in ranks.items() if r != rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "target_modules": kinds,
        "rank_pattern": larger,
        "alpha_pattern": {kind: scale * r for kind, r in larger.items()},
        "fan_in_fan_out": any(part.transpose for part in naming.parts.values()),
        **_PLAIN,
    }
    write_json(folder / ADAPTER_CONFIG, settings)
    tensors = {f"{_PREFIX}{module}{_A}": u.a for module, u in modules.items()}
    tensors |= {f"{_PREFIX}{module}{_B}": u.b for module, u in modules.items()}
    metadata = {_BASE: adapter.base} if adapter.base else {}
    safetensors.write(folder / ADAPTER_WEIGHTS, tensors, metadata=metadata)


def _kind(module: str) -> str:
    """model.layers.3.mlp.down_proj -> mlp.down_proj: the end of a name that means the same in every layer."""
    return re.split(r"\.\d+\.", module)[-1]


def _fused(updates: Mapping[str, LowRankUpdate], naming: Naming, c: ModelConfig) -> dict[str, LowRankUpdate]:
    """Updates by the publisher's modules."""
    parts: dict[str, list[str]] = {}
    for name in updates:
        parts.setdefault(stored_name(naming, f"{name}.weight").removesuffix(".weight"), []).append(name)
    return {module: _join([(name, updates[name]) for name in names], naming, c) for module, names in parts.items()}


def _join(parts: list[tuple[str, LowRankUpdate]], naming: Naming, c: ModelConfig) -> LowRankUpdate:
    part, _ = part_of(naming, f"{parts[0][0]}.weight")
    if not part.rows:
        return parts[0][1]
    b = np.zeros((span(part.rows, c)[2], sum(len(u.a) for _, u in parts)), np.float32)
    at = 0
    for name, update in parts:
        place_rows(b[:, at : at + len(update.a)], part_of(naming, f"{name}.weight")[0], c, update.b)
        at += len(update.a)
    return LowRankUpdate(np.concatenate([u.a for _, u in parts]), b, parts[0][1].scale)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path, naming: Naming, c: ModelConfig) -> Adapter:
    """An adapter for a model of this family and configuration, PEFT's own or ours.

    Raises CheckpointError when it is broken or for another model, UnsupportedModelError for other kinds of adapters.
    """
    folder = Path(folder)
    settings = read_json_object(folder / ADAPTER_CONFIG)
    _check_kind(folder, settings)
    stored = safetensors.read(folder / ADAPTER_WEIGHTS)
    modules = {_module(folder, name) for name in stored}
    updates = {}
    for name, shape in tensor_shapes(c).items():
        part, _ = part_of(naming, name)
        if not part.name or not name.endswith(".weight") or len(shape) != 2:
            continue
        module = stored_name(naming, name).removesuffix(".weight")
        if module in modules:
            rows = span(part.rows, c)[2] if part.rows else shape[0]
            a, b = _pair(folder, stored, module, (rows, shape[1]))
            updates[name.removesuffix(".weight")] = LowRankUpdate(
                a, take_rows(b, part, c), _scale(settings, module, len(a))
            )
    used = {stored_name(naming, f"{name}.weight").removesuffix(".weight") for name in updates}
    if spare := sorted(modules - used):
        raise CheckpointError(f"{folder} adapts {spare[0]}, which the model does not have; it is for another model")
    return Adapter(updates, safetensors.read_metadata(folder / ADAPTER_WEIGHTS).get(_BASE))


def _check_kind(folder: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise UnsupportedModelError(
            f"{folder} is an adapter of the kind {settings.get('peft_type')}; only LORA is supported"
        )
    for name, plain in _PLAIN.items():
        value = settings.get(name) or plain
        if value != plain:
            raise UnsupportedModelError(f"{folder}: {name} is {value!r}; only plain LoRA, with {plain!r}, is supported")


def _module(folder: Path, name: str) -> str:
    if not name.startswith(_PREFIX) or not name.endswith((_A, _B)):
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} holds {name}, which is not a part of a LoRA adapter")
    return name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)


def _pair(
    folder: Path, stored: Mapping[str, safetensors.Tensor], module: str, shape: tuple[int, int]
) -> tuple[FloatArray, FloatArray]:
    a, b = (stored.get(f"{_PREFIX}{module}{side}") for side in (_A, _B))
    shapes = [() if t is None else t.shape for t in (a, b)]
    if a is None or b is None or shapes != [(*a.shape[:1], shape[1]), (shape[0], *a.shape[:1])]:
        found = " and ".join(str(list(s)) if s else "missing" for s in shapes)
        raise CheckpointError(
            f"{folder}: lora_A and lora_B of {module} are {found}; [rank, {shape[1]}] and [{shape[0]}, rank] are needed"
        )
    return a.read(), b.read()


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = settings.get("lora_alpha")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
    if not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{ADAPTER_CONFIG} has lora_alpha {alpha!r}; a number is needed")
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))
