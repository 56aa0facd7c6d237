"""A KV cache on disk: the tokens that were run, their keys and values, and what the caller wants kept beside them.

    16 bytes  magic                    32 bytes  sha256 of all that follows
     8 bytes  length of the header     header    JSON, padded with spaces so that the tensors begin at a multiple of 64
    tensors   [n_kv_head, tokens, head_dim] each, in the order of graph_io.past_names, as the graph holds them

Nothing is rounded: what is read back is bit for bit what was saved. Plain bytes, so that opening a file from elsewhere
runs nothing. Keys are stored rotated, at their positions, and are right only for the very weights that made them: the
header names the bundle by its `fingerprint`, and a cache of any other is refused.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterable, Mapping
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gptedge.bundle import fingerprint
from gptedge.errors import DataError
from gptedge.files import new_file
from gptedge.runtime.adapter import Adapter
from gptedge.runtime.kv_cache import KVCache
from gptedge.runtime.session import Session

_MAGIC = b"gptedge-kv-1\n\0\0\0"
_DIGEST = slice(len(_MAGIC), len(_MAGIC) + 32)
_LENGTH = struct.Struct("<Q")
_HEADER = _DIGEST.stop + _LENGTH.size
_ALIGNMENT = 64


def save_cache(path: Path, session: Session, cache: KVCache, state: Mapping[str, Any]) -> None:
    """Write `cache` and `state`, which is JSON-ready, to a file that only its owner may read. Raises DataError."""
    try:
        _write(path, session, cache, state)
    except OSError as e:
        raise DataError(f"{path} cannot be written: {e.strerror or e}") from None


def _write(path: Path, session: Session, cache: KVCache, state: Mapping[str, Any]) -> None:
    header = _padded(
        json.dumps(
            {**_identity(session, cache.adapter), "ids": cache.ids, "state": dict(state)}, ensure_ascii=False
        ).encode()
    )
    digest = hashlib.sha256()
    with new_file(Path(path)) as work:
        work.touch(mode=0o600)
        with work.open("wb") as f:
            f.write(_MAGIC + bytes(digest.digest_size))
            parts: Iterable[bytes | memoryview] = chain(
                [_LENGTH.pack(len(header)), header], (tensor.data for tensor in cache.tensors())
            )
            for part in parts:
                digest.update(part)
                f.write(part)
            f.seek(_DIGEST.start)
            f.write(digest.digest())


def load_cache(path: Path, session: Session, adapter: Adapter | None = None) -> tuple[KVCache, dict[str, Any]]:
    """The cache and the state that `save_cache` wrote.

    Raises DataError unless the file is whole, and made by this bundle with this adapter.
    """
    try:
        with Path(path).open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _read(path, memoryview(content), session, adapter)
    except (OSError, ValueError) as e:  # ValueError: an empty file cannot be mapped
        raise DataError(f"{path} cannot be read as a saved chat: {getattr(e, 'strerror', None) or e}") from None


def _read(path: Path, content: memoryview, session: Session, adapter: Adapter | None) -> tuple[KVCache, dict[str, Any]]:
    with content:
        if bytes(content[: len(_MAGIC)]) != _MAGIC:
            raise DataError(f"{path} is not a saved chat of this gptedge")
        header, start = _header(path, content)
        _check_identity(path, header, _identity(session, adapter))
        ids, layout = header["ids"], session.signature.cache
        dtype = np.dtype(layout.dtype)
        shapes = [(heads, len(ids), width) for heads, width in layout.shapes]
        expected = start + sum(map(prod, shapes)) * dtype.itemsize
        if len(content) != expected:
            raise DataError(f"{path} has {len(content)} bytes and should have {expected}; it was cut off or changed")
        if hashlib.sha256(content[_DIGEST.stop :]).digest() != bytes(content[_DIGEST]):
            raise DataError(f"{path} is not what was saved (sha256 differs); delete it")
        tensors = []
        for shape in shapes:
            tensors.append(np.frombuffer(content, dtype, prod(shape), start).reshape(shape))
            start += tensors[-1].nbytes
        cache = session.new_cache(adapter)
        cache.fill(ids, tensors, session.context_length)  # copies, so that the file may go
        del tensors
        return cache, header["state"]


def _header(path: Path, content: memoryview) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    try:
        (length,) = _LENGTH.unpack(content[_DIGEST.stop : _HEADER])
        header = json.loads(bytes(content[_HEADER : _HEADER + length]))
        if isinstance(header["state"], dict) and all(type(i) is int for i in header["ids"]):
            return header, _HEADER + length
    except (ValueError, KeyError, TypeError, OverflowError, struct.error):
        pass
    raise DataError(f"{path} was cut off or changed: its header cannot be read; delete it")


def _identity(session: Session, adapter: Adapter | None) -> dict[str, Any]:
    """What made the keys and values."""
    layout = session.signature.cache
    return {
        "bundle": fingerprint(session.bundle),
        "recipe": session.bundle.recipe,
        "dtype": np.dtype(layout.dtype).name,
        "shapes": [list(shape) for shape in layout.shapes],
        "adapter": None if adapter is None else _adapter_id(adapter),
    }


def _adapter_id(adapter: Adapter) -> str:
    digest = hashlib.sha256(json.dumps(adapter.names).encode())
    for value in adapter.values:
        digest.update(np.ascontiguousarray(value.numpy()).data)
    return digest.hexdigest()


def _check_identity(path: Path, header: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [key for key, value in wanted.items() if header.get(key) != value]
    if different == ["adapter"]:
        raise DataError(f"{path} was saved with another adapter than this model's; assign the one it was saved with")
    if different:
        theirs, ours = (f"({h.get('recipe')}, {str(h.get('bundle'))[:12]})" for h in (header, wanted))
        raise DataError(
            f"{path} was saved with another bundle {theirs} than this one {ours}, whose keys and values differ; "
            "open it with that one"
        )


def _padded(header: bytes) -> bytes:
    return header + b" " * (-(_HEADER + len(header)) % _ALIGNMENT)
