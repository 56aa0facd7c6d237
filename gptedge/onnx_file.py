"""ONNX files whose weights lie in one data file beside them: written as a stream, read through a memory map.

Needs the `onnx` package, so only export and quantize import this. It does not know what a graph computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from gptedge.errors import BundleError

PAGE, CACHE_LINE = 4096, 64
"""Bytes; large tensors start on a page, as the ONNX specification advises for mapping them, others on a cache line."""
_LARGE = 1 << 18
INLINE_LIMIT = 1024
"""Bytes; smaller tensors stay inside the .onnx file."""
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
IR_VERSION = 10
MICROSOFT = "com.microsoft"

_Array = npt.NDArray[Any]


class WeightFile:
    """Appends tensors to a data file. A context manager; `add` returns the initializer that points at the bytes."""

    def __init__(self, path: Path) -> None:
        self._file = Path(path).open("wb")  # noqa: SIM115  (closed by __exit__)
        self._location = Path(path).name

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, chunks: Iterable[_Array]) -> TensorProto:
        """Write one tensor, given as chunks along its first axis (one at a time in memory); small ones stay inline."""
        chunks = iter(chunks)
        first = next(chunks)
        if first.nbytes < INLINE_LIMIT:
            first = np.concatenate([first, *chunks])
            chunks = iter(())
            if first.nbytes < INLINE_LIMIT:
                return onnx.numpy_helper.from_array(first, name)
        alignment = PAGE if first.nbytes >= _LARGE else CACHE_LINE
        start = -(-self._file.tell() // alignment) * alignment
        self._file.write(b"\0" * (start - self._file.tell()))
        rows = 0
        for chunk in itertools.chain([first], chunks):
            self._file.write(np.ascontiguousarray(chunk).data)
            rows += len(chunk)
        return self._pointer(name, (rows, *first.shape[1:]), first.dtype, start)

    def _pointer(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], start: int) -> TensorProto:
        tensor = TensorProto(name=name, dims=shape, data_type=helper.np_dtype_to_tensor_dtype(dtype))
        tensor.data_location = TensorProto.EXTERNAL
        length = self._file.tell() - start
        for key, value in (("location", self._location), ("offset", start), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def save_graph(path: Path, model: onnx.ModelProto) -> None:
    """Write the .onnx file; the same model gives the same bytes."""
    Path(path).write_bytes(model.SerializeToString(deterministic=True))


def load_graph(path: Path) -> onnx.ModelProto:
    """Read the .onnx file without its weights. Raises BundleError when it is not one."""
    try:
        return onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing") from None
    except Exception as e:  # protobuf's DecodeError has no public home that stays put
        raise BundleError(f"{path} is not an ONNX file ({type(e).__name__})") from None


def offset_of(tensor: TensorProto) -> int:
    """Where an initializer's bytes begin in its data file; 0 for one inside the .onnx file."""
    return int(_place(tensor).get("offset", 0))


def _place(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def read_initializer(tensor: TensorProto, folder: Path) -> _Array:
    """A weight as an array; external ones are a read-only view of the mapped file."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    location = _place(tensor).get("location", "")
    if Path(location).name != location:
        raise BundleError(f"{tensor.name}: external data {location!r} lies outside the bundle")
    dtype, shape = helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
    path, offset = Path(folder) / location, offset_of(tensor)
    size = int(np.prod(shape)) * dtype.itemsize
    if not path.is_file() or path.stat().st_size < offset + size:
        raise BundleError(f"{path} is missing or cut short: {tensor.name} ends at byte {offset + size}")
    return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)
