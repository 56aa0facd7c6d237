"""The GGUF container: metadata and the table of tensors, read through a memory map.

    magic "GGUF" | version | n_tensors | n_keys | key, type, value … | name, dims, type, offset … | padding | data

Every length is checked against the file before it is used, and every tensor's extent before any is read. What keys and
tensors mean is `gguf_file`'s concern, and dequantizing is the `gguf` package's. That package's own reader is not used:
it makes an array per string, which takes 3.4 s for a vocabulary of 49,152 tokens, against 0.1 s here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gptedge.errors import CheckpointError, MissingExtraError, UnsupportedModelError
from gptedge.safetensors import Bytes, FloatArray, Tensor, map_bytes

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # ggml's own bound
_MAX_NESTING = 4  # arrays of arrays; files in use have none
_STRING, _ARRAY = 8, 9
_F32 = 6
_SCALARS: dict[int, str] = {  # value type -> struct's letter
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    _F32: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_VALUES_AT_ONCE = 1 << 18  # dequantized in one call: bounds the temporaries to a few MB


@dataclass(frozen=True)
class Container:
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    """By GGUF's names; shapes are those of numpy, rows first."""


def read(path: Path) -> Container:
    """Metadata and tensors of one file. Raises CheckpointError when the file is not whole and well-formed."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing" if not path.exists() else f"{path} is not a file")
    cursor = _Cursor(path, map_bytes(path, 0, path.stat().st_size).data)
    n_tensors, n_keys = _preamble(cursor)
    metadata = _metadata(cursor, n_keys)
    return Container(metadata, _tensors(cursor, n_tensors, _alignment(path, metadata)))


class _Cursor:
    """Reads values one after another; CheckpointError instead of reading past the end."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.data) - self.at:
            raise CheckpointError(f"{self.path} is cut short: {what} reaches past its {len(self.data)} bytes")
        start, self.at = self.at, self.at + count
        return self.data[start : self.at]

    def numbers(self, letter: str, count: int, what: str) -> tuple[Any, ...]:
        form = f"<{count}{letter}"
        size = struct.calcsize(f"<{letter}") * count  # before struct allocates anything for an absurd count
        return struct.unpack(form, self.take(size, what))

    def number(self, letter: str, what: str) -> Any:
        return self.numbers(letter, 1, what)[0]

    def string(self, what: str) -> str:
        return self._text(self.take(self.number("Q", what), what), what)

    def strings(self, count: int, what: str) -> list[str]:
        """`string` in a loop, inlined: vocabularies have hundreds of thousands."""
        found: list[str] = []
        data, at, end, length = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = at + 8
            at = start + length(data, at)[0] if start <= end else end + 1
            if at > end:
                raise CheckpointError(f"{self.path} is cut short: {what} reaches past its {end} bytes")
            found.append(self._text(data[start:at], what))
        self.at = at
        return found

    def _text(self, raw: memoryview, what: str) -> str:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8 text; the file is damaged") from None


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    if bytes(cursor.data[:4]) != MAGIC:
        raise CheckpointError(f"{cursor.path} is not a GGUF file, or is cut short ({len(cursor.data)} bytes)")
    cursor.take(4, "the magic")
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
        endian = " (big-endian)" if version and version & 0xFFFF == 0 else ""
        raise CheckpointError(f"{cursor.path} is GGUF version {version}{endian}; versions 2 and 3 can be read")
    n_tensors, n_keys = cursor.numbers("Q", 2, "the header")
    return n_tensors, n_keys


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(count):
        key = cursor.string(f"the name of metadata key {i + 1} of {count}")
        if key in metadata:
            raise CheckpointError(f"{cursor.path} has the metadata key {key} twice")
        metadata[key] = _value(cursor, cursor.number("I", key), key)
    return metadata


def _value(cursor: _Cursor, kind: int, key: str, depth: int = 0) -> Any:
    if kind == _STRING:
        return cursor.string(key)
    if kind == _ARRAY and depth < _MAX_NESTING:
        return _array(cursor, key, depth)
    if kind not in _SCALARS:
        raise CheckpointError(f"{cursor.path}: {key} has the value type {kind}, which GGUF does not have")
    value = cursor.number(_SCALARS[kind], key)
    return _shortest(value) if kind == _F32 else value


def _array(cursor: _Cursor, key: str, depth: int) -> list[Any]:
    kind, count = cursor.number("I", key), cursor.number("Q", key)
    if kind == _STRING:
        return cursor.strings(count, key)
    if kind in _SCALARS:
        return list(cursor.numbers(_SCALARS[kind], count, key))
    return [_value(cursor, kind, key, depth + 1) for _ in range(count)]


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 was written as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}; it must be a power of two")
    return alignment


# ---- tensors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType; untyped here because the package is optional
    begin: int
    end: int


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, Tensor]:
    entries = [_entry(cursor, f"entry {i + 1} of {count} in the tensor table") for i in range(count)]
    start = -(-cursor.at // alignment) * alignment
    _check_extents(cursor.path, entries, len(cursor.data) - start)
    for kind in sorted({entry.kind for entry in entries}):
        _check_readable(cursor.path, kind)
    tensors = {entry.name: _tensor(cursor.path, entry, start + entry.begin) for entry in entries}
    if len(tensors) < count:
        raise CheckpointError(f"{cursor.path} names a tensor twice")
    return tensors


def _entry(cursor: _Cursor, what: str) -> _Entry:
    name = cursor.string(what)
    n_dims = cursor.number("I", what)
    if not 1 <= n_dims <= _MAX_DIMENSIONS:
        raise CheckpointError(f"{cursor.path}: {name} has {n_dims} dimensions; GGUF has 1 to {_MAX_DIMENSIONS}")
    shape = cursor.numbers("Q", n_dims, what)[::-1]  # stored with the fastest-changing dimension first
    kind, block, block_bytes = _kind(cursor, cursor.number("I", what), name)
    begin = cursor.number("Q", what)
    if shape[-1] % block:
        raise CheckpointError(f"{cursor.path}: {name} has rows of {shape[-1]}; {kind.name} stores blocks of {block}")
    return _Entry(name, shape, kind, begin, begin + math.prod(shape) // block * block_bytes)


def _check_extents(path: Path, entries: list[_Entry], available: int) -> None:
    """Before anything is read: each tensor lies inside the file, and on no other."""
    in_order = sorted(entries, key=lambda e: (e.begin, e.end))
    for entry in in_order:
        if entry.end > available:
            raise CheckpointError(
                f"{path} is cut short: {entry.name} ends at byte {entry.end} of the data, "
                f"and {max(available, 0)} are there"
            )
    for one, next_one in pairwise(in_order):
        if next_one.begin < one.end:
            raise CheckpointError(f"{path}: the tensors {one.name} and {next_one.name} overlap; the file is damaged")


def _tensor(path: Path, entry: _Entry, begin: int) -> Tensor:
    rows = entry.shape[0]
    row = (entry.end - entry.begin) // rows if rows else 0  # bytes

    def read_rows(first: int, last: int) -> FloatArray:
        stored = map_bytes(path, begin + first * row, begin + last * row)
        return dequantize(stored, entry.kind).reshape(last - first, *entry.shape[1:])

    return Tensor(entry.shape, entry.kind.name, lambda: read_rows(0, rows), read_rows)


# ---- the gguf package ----------------------------------------------------------------------------------------------


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError('reading GGUF files needs the gguf package; pip install "gptedge[export]"') from None
    return gguf


def _kind(cursor: _Cursor, number: int, name: str) -> tuple[Any, int, int]:
    """The quantization type, and its block's width and bytes."""
    gguf = _gguf()
    try:
        kind = gguf.GGMLQuantizationType(number)
        return kind, *gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise UnsupportedModelError(f"{cursor.path}: {name} has the GGML type {number}, which is not known") from None


def _check_readable(path: Path, kind: Any) -> None:
    gguf = _gguf()
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:  # how the gguf package says that it knows a type only by name
        raise UnsupportedModelError(f"{path} has tensors of type {kind.name}, which cannot be dequantized") from None


def dequantize(stored: Bytes, kind: Any) -> FloatArray:
    """Whole blocks of stored bytes as float32, one dimension, a few MB at a time.

    Blocks do not depend on each other, so rows are ignored: given rows, the package works on 16 at once, which took
    2.5 s of processor time for 135M parameters against 1.1 s.
    """
    if kind.name == "F32":
        return stored.view("<f4")
    gguf = _gguf()
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = stored.reshape(-1, block_bytes)
    at_once = max(1, _VALUES_AT_ONCE // block)
    out = np.empty((len(blocks), block), np.float32)
    for i in range(0, len(blocks), at_once):
        piece = blocks[i : i + at_once]
        out[i : i + at_once] = gguf.quants.dequantize(piece.reshape(1, -1), kind).reshape(-1, block)
    return out.reshape(-1)
