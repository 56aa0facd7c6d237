"""LoRA adapters of a loaded bundle, in onnxruntime's own file format: read once, and given to the graph at every run.

onnxruntime would bind one through its RunOptions, but not in the call that optional inputs need; so the matrices are
given as the inputs that they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptedge.bundle import LORA, Bundle
from gptedge.errors import BundleError, UsageError
from gptedge.graph_io import LORA_A, LORA_B

_KIND = "tensor(float)"


@dataclass(frozen=True, eq=False)
class Adapter:
    """What `Model.load_adapter` gives. It may be used by any number of chats."""

    path: Path
    names: tuple[str, ...] = field(repr=False)
    """Inputs of the graph."""
    values: tuple[Any, ...] = field(repr=False)
    """OrtValues, on the device where the graph runs."""
    file: Any = field(repr=False)
    """What onnxruntime read; it owns the memory of values on the CPU."""


def model_version(base: str) -> int:
    """The number in an adapter's file that says which weights it is for, of `checkpoint.weights_id`."""
    return int(base[:7], 16)  # the format has 32 bits, one of them a sign


def lora_base(bundle: Bundle) -> str:
    """The id of the weights that the bundle's adapters are for. Raises UsageError when it takes none."""
    entry = (bundle.manifest or {}).get(LORA)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("base"), str):
        raise UsageError(f"{bundle.path} takes no adapters; export the model with --lora-inputs")
    return str(entry["base"])


def read_adapter(ort: Any, path: Path, bundle: Bundle, inputs: Sequence[Any], device: str) -> Adapter:
    """Read a .onnx_adapter file for the graph whose optional inputs are `inputs`.

    Raises UsageError when the bundle takes none, BundleError when the file is broken or for another model.
    """
    path, base = Path(path), lora_base(bundle)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; make a file of it with gptedge adapter {path} {bundle.path} OUT")
    if not path.is_file():
        raise UsageError(f"adapter {path} does not exist")
    try:
        file = ort.AdapterFormat.read_adapter(str(path))
        parameters, version = file.get_parameters(), file.get_model_version()
    except Exception as e:  # onnxruntime's exceptions share no public base
        raise BundleError(f"{path} is not an adapter that onnxruntime reads: {str(e).splitlines()[0]}") from None
    if version != model_version(base):
        raise BundleError(f"{path} was made for another model than {bundle.path}; make it again with gptedge adapter")
    _check(path, parameters, {i.name: i for i in inputs})
    values = parameters.values()
    if device != "cpu":
        values = [ort.OrtValue.ortvalue_from_numpy(v.numpy(), device, 0) for v in values]
    return Adapter(path, tuple(parameters), tuple(values), file)


def _check(path: Path, parameters: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Names, kinds and shapes: what does not fit would only be found by the first run."""
    for name, value in parameters.items():
        wanted = inputs[name].shape if name in inputs and name.endswith((LORA_A, LORA_B)) else None
        if wanted is None or value.data_type() != _KIND or not _fits(value.shape(), wanted):
            raise BundleError(f"{path} holds {name} {value.shape()}, which the bundle's graph does not take")
        a, b = (parameters.get(name.rpartition(".")[0] + side) for side in (LORA_A, LORA_B))
        if a is None or b is None or a.shape()[1:] != b.shape()[:1]:
            raise BundleError(f"{path} holds {name} without a counterpart of its rank")


def _fits(shape: Sequence[int], wanted: Sequence[int | str]) -> bool:
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(w == have for have, w in pairs if isinstance(w, int))
