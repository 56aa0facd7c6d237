"""The safetensors file format, read through a memory map and written as a stream, in numpy alone.

Format (huggingface/safetensors, README): 8 bytes little-endian N, N bytes of JSON that map each name to `dtype`,
`shape` and `data_offsets`, then the tensors' bytes. The reference implementation is Rust; this one is not. Floating
kinds are read as float32. Each read maps its bytes anew, so that a tensor that is float32 already costs no copy
and its pages leave this process together with the array.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptedge.errors import CheckpointError

FloatArray = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

PIECE_BYTES = 1 << 22
"""About how much `Tensor.pieces` reads at once, as float32: what a processor's cache holds."""
_MAX_HEADER = 100_000_000  # bytes; the bound of the format's reference reader


def widen_bfloat16(bits: npt.NDArray[np.uint16]) -> FloatArray:
    """bfloat16 bit patterns as float32: the upper half of the same number."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# dtype in the file -> (numpy dtype of the stored bytes, how to make float32 of it; None: not a floating kind)
_KINDS: dict[str, tuple[str, Callable[[npt.NDArray[Any]], FloatArray] | None]] = {
    "F32": ("<f4", lambda a: np.asarray(a, np.float32)),
    "F64": ("<f8", lambda a: a.astype(np.float32)),
    "F16": ("<f2", lambda a: a.astype(np.float32)),
    "BF16": ("<u2", widen_bfloat16),
    "I64": ("<i8", None),
    "I32": ("<i4", None),
    "I16": ("<i2", None),
    "I8": ("i1", None),
    "U8": ("u1", None),
    "BOOL": ("?", None),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor that is read when asked for: `read()` gives float32 of `shape`, and holds no copy afterwards."""

    shape: tuple[int, ...]
    dtype: str
    """The format's own name of the stored kind: F32, F16, BF16, Q4_1, …"""
    read: Callable[[], FloatArray]
    read_rows: Callable[[int, int], FloatArray] | None = None
    """Rows from one up to another along the first axis, where they can be read without the others."""

    def pieces(self) -> Iterator[FloatArray]:
        """The tensor in pieces along its first axis, of about PIECE_BYTES where it can be read so."""
        if self.read_rows is None or not self.shape:
            yield self.read()
            return
        step = max(1, PIECE_BYTES // max(1, 4 * math.prod(self.shape[1:])))
        for start in range(0, max(1, self.shape[0]), step):
            yield self.read_rows(start, min(start + step, self.shape[0]))

    def take(self, ids: Sequence[int]) -> FloatArray:
        """Those rows, [len(ids), …], a copy."""
        if self.read_rows is None:
            return self.read()[list(ids)]
        return np.concatenate([self.read_rows(i, i + 1) for i in ids])


def map_bytes(path: Path, begin: int, end: int) -> Bytes:
    """Bytes of a file, mapped for as long as the array lives."""
    if begin == end:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r", offset=begin, shape=(end - begin,))


def finite(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The same tensors; reading NaN or infinity from one raises CheckpointError."""
    return {name: _checked(tensor, f"{where}: {name}") for name, tensor in tensors.items()}


def _checked(tensor: Tensor, what: str) -> Tensor:
    def check(array: FloatArray) -> FloatArray:
        # One pass at the memory's speed, and no second array; huge numbers may overflow it, and are looked at again.
        if not np.isfinite(np.vdot(array, array)) and not np.isfinite(array).all():
            raise CheckpointError(
                f"{what} holds numbers that are not finite (NaN or infinity); the checkpoint is damaged"
            )
        return array

    rows = tensor.read_rows
    return replace(
        tensor,
        read=lambda: check(tensor.read()),
        read_rows=None if rows is None else lambda first, last: check(rows(first, last)),
    )


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of one file by name. Raises CheckpointError when the file is not whole and well-formed."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    size = path.stat().st_size
    header, start = _header(path, size)
    tensors, extents = {}, []
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name], extent = _tensor(path, name, entry, start, size)
            extents.append(extent)
    _check_layout(path, extents, size - start)
    return tensors


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} is not a safetensors file, or is cut short ({size} bytes)")
        try:
            header = json.loads(f.read(length))
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{path}: the header is not JSON ({e})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    return header, 8 + length


def _check_layout(path: Path, extents: list[tuple[int, int, str]], size: int) -> None:
    """The format wants the tensors' bytes one after another: no overlap, no gap, nothing after the last."""
    at = 0
    for begin, end, name in sorted(extents):
        if begin != at:
            raise CheckpointError(f"{path}: {name} begins at byte {begin} of the data; the tensor before ends at {at}")
        at = end
    if at != size:
        raise CheckpointError(f"{path} has {size} bytes of data, and its tensors take {at}")


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> tuple[Tensor, tuple[int, int, str]]:
    """The tensor that a header's entry describes, and its extent in the data, which begins at `start` of the file."""
    try:
        kind, shape = str(entry["dtype"]), tuple(map(_count, entry["shape"]))
        begin, end = map(_count, entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: the header's entry for {name} is malformed") from None
    if kind not in _KINDS:
        raise CheckpointError(f"{path}: {name} has dtype {kind}; known are {', '.join(_KINDS)}")
    stored, to_float = _KINDS[kind]
    if end - begin != math.prod(shape) * np.dtype(stored).itemsize:
        raise CheckpointError(f"{path}: {name} has {end - begin} bytes, which is not what {kind} {list(shape)} takes")
    if end > size - start:
        raise CheckpointError(
            f"{path} is cut short: {name} ends at byte {end} of the data, and {size - start} are there"
        )
    row = (end - begin) // shape[0] if shape and shape[0] else 0  # bytes

    def load(first: int, last: int, of: tuple[int, ...]) -> FloatArray:
        if to_float is None:
            raise CheckpointError(f"{path}: {name} has dtype {kind}; a floating kind is needed")
        return to_float(map_bytes(path, start + first, start + last).view(stored).reshape(of))

    def read_rows(first: int, last: int) -> FloatArray:
        return load(begin + first * row, begin + last * row, (last - first, *shape[1:]))

    return Tensor(shape, kind, lambda: load(begin, end, shape), read_rows), (begin, end, name)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def read_metadata(path: Path) -> dict[str, str]:
    """What the file says of itself. Raises CheckpointError as `read` does."""
    stated = _header(Path(path), Path(path).stat().st_size)[0].get("__metadata__")
    return {str(k): str(v) for k, v in stated.items()} if isinstance(stated, dict) else {}


def write(
    path: Path,
    tensors: Mapping[str, npt.NDArray[Any]] | Iterable[tuple[str, npt.NDArray[Any]]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write float32 tensors in the order of their names; the same tensors give the same bytes."""
    named = dict(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in sorted(named):
        size = 4 * named[name].size
        header[name] = {"dtype": "F32", "shape": list(named[name].shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with Path(path).open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name in sorted(named):
            f.write(np.ascontiguousarray(named[name], "<f4").data)
