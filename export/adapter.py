"""Making a LoRA adapter that onnxruntime loads beside a bundle, from one in PEFT's format.

    adapter_config.json  adapter_model.safetensors   ─▶   NAME.onnx_adapter (onnxruntime's own format, flatbuffers)

The graph's layers are fewer than the model's: q, k and v are one product, gate and up another. Their updates become
one, of a rank as large as theirs together, with the scale multiplied in. No torch, no onnx.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptedge.bundle import Bundle, open_bundle
from gptedge.config import ModelConfig
from gptedge.errors import CheckpointError, OutputExistsError, UnsupportedModelError
from gptedge.export.rotary import MULTIPLE, is_spread, spread_weights
from gptedge.families import family_of, tensor_shapes
from gptedge.files import new_file
from gptedge.graph_io import LORA_A, LORA_B
from gptedge.lora_files import LowRankUpdate, read_adapter
from gptedge.runtime.adapter import lora_base, model_version
from gptedge.runtime.onnx_runtime import import_onnxruntime
from gptedge.safetensors import FloatArray, Tensor

_FUSED = {"attn.q": "attn.qkv", "attn.k": "attn.qkv", "attn.v": "attn.qkv", "mlp.gate": "mlp.gate_up"}
_PORTABLE = "portable"
_FORMAT = 1


@dataclass(frozen=True)
class AdapterResult:
    adapter: Path
    layers: int
    """Of the graph, that it changes."""
    rank: int
    """The largest of the adapter's; in the graph, a layer fused of several has that of all of them together."""
    base_checked: bool
    """Whether the adapter said what it was trained on; PEFT's own do not."""


def make_adapter(source: Path, bundle: Path, out: Path, *, force: bool = False) -> AdapterResult:
    """Write `out` from the PEFT folder `source`, for `bundle` and all that were quantized from it.

    Raises UsageError when the bundle takes no adapters, CheckpointError when the adapter is broken or another model's.
    """
    out = Path(out)
    if out.exists() and not force:
        raise OutputExistsError(f"{out} exists already; choose another output or add --force")
    opened = open_bundle(Path(bundle))
    base = lora_base(opened)
    family = family_of(dict(opened.config))
    config = family.config(dict(opened.config))
    adapter = read_adapter(Path(source), family.files, config)
    if adapter.base not in (None, base):
        raise CheckpointError(
            f"{source} was trained on other weights than {bundle} holds ({str(adapter.base)[:8]}… and {base[:8]}…); "
            "export the model that it was trained on"
        )
    updates = _spread(opened, config, adapter.updates)
    layers = _layers(config, updates)
    _write(out, layers, base)
    rank = max(len(update.a) for update in updates.values())
    return AdapterResult(out, len(layers), rank, adapter.base is not None)


def _spread(bundle: Bundle, c: ModelConfig, updates: Mapping[str, LowRankUpdate]) -> dict[str, LowRankUpdate]:
    """Rows of q and k in the order that the graph has them, see `rotary`."""
    portable = (bundle.manifest or {}).get("graph") == _PORTABLE
    if not is_spread(c, c.head_dim if portable else MULTIPLE):
        return dict(updates)
    rows = spread_weights(c, {name: _tensor(u.b) for name, u in updates.items()})
    return {name: LowRankUpdate(u.a, rows[name].read(), u.scale) for name, u in updates.items()}


def _tensor(array: FloatArray) -> Tensor:
    return Tensor(array.shape, "F32", lambda: array)


def _layers(c: ModelConfig, updates: Mapping[str, LowRankUpdate]) -> dict[str, tuple[FloatArray, FloatArray]]:
    """A [in, r] and B [r, out] by the names of the graph's linear layers."""
    sizes = {name.removesuffix(".weight"): shape[0] for name, shape in tensor_shapes(c).items()}
    found = {}
    for i in range(c.n_layer):
        parts: dict[str, list[str]] = {}
        for kind in _kinds(c):
            parts.setdefault(_FUSED.get(kind, "mlp.gate_up" if c.gated and kind == "mlp.up" else kind), []).append(kind)
        for layer, kinds in parts.items():
            names = [f"blocks.{i}.{kind}" for kind in kinds]
            if any(name in updates for name in names):
                found[f"blocks.{i}.{layer}"] = _join(names, updates, sizes)
    layers = {name for i in range(c.n_layer) for kind in _kinds(c) for name in [f"blocks.{i}.{kind}"]}
    if other := sorted(set(updates) - layers):
        raise UnsupportedModelError(f"the adapter changes {other[0]}, and graphs take updates of blocks' layers alone")
    return found


def _kinds(c: ModelConfig) -> list[str]:
    """The linear layers of a block, those that are fused side by side in their order."""
    return ["attn.q", "attn.k", "attn.v", "attn.o", *(["mlp.gate"] if c.gated else []), "mlp.up", "mlp.down"]


def _join(
    names: Sequence[str], updates: Mapping[str, LowRankUpdate], sizes: Mapping[str, int]
) -> tuple[FloatArray, FloatArray]:
    """The parts' A's side by side, and their B's in the columns that are theirs."""
    there = [name for name in names if name in updates]
    b = np.zeros((sum(len(updates[name].a) for name in there), sum(sizes[name] for name in names)), np.float32)
    row = column = 0
    for name in names:
        if name in updates:
            u = updates[name]
            b[row : row + len(u.a), column : column + sizes[name]] = u.scale * u.b.T
            row += len(u.a)
        column += sizes[name]
    return np.concatenate([updates[name].a for name in there]).T, b


def _write(out: Path, layers: Mapping[str, tuple[FloatArray, FloatArray]], base: str) -> None:
    ort = import_onnxruntime()
    file = ort.AdapterFormat()
    file.set_adapter_version(_FORMAT)
    file.set_model_version(model_version(base))
    arrays = {f"{name}{LORA_A}": a for name, (a, _) in layers.items()}
    arrays |= {f"{name}{LORA_B}": b for name, (_, b) in layers.items()}
    held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # OrtValues only point at them
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in held.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_file(out) as work:
        try:
            file.export_adapter(str(work))
        except RuntimeError as e:  # onnxruntime says where in its own source, and not why
            needed = sum(array.nbytes for array in held.values())
            is_full = shutil.disk_usage(work.parent).free < needed
            raise (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if is_full else e) from None
