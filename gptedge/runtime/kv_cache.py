"""The KV cache of one conversation, of the two kinds that graphs ask for.

    shared    buffers with room to spare, bound as the graph's past and present at once: GroupQueryAttention appends in
              place, so a step copies nothing. Full ones grow by a quarter.
    growing   tensors of exactly the tokens held: the graph reads them as its past and gives longer ones as its present,
              which take their place.

Not thread-safe: a cache belongs to one conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gptedge.runtime.adapter import Adapter

_LEAST_ROOM = 256  # tokens more than there are


@dataclass(frozen=True)
class CacheLayout:
    """What a graph asks of its cache."""

    shapes: tuple[tuple[int, int], ...]
    """n_kv_head and head_dim of each tensor, in the order of graph_io.past_names."""
    dtype: npt.DTypeLike
    shared: bool
    """Past and present are one buffer."""
    device: str = "cpu"
    """Where the tensors lie, by onnxruntime's name: cpu or cuda."""


def room_for(n_tokens: int, limit: int) -> int:
    """How many tokens to make room for where `n_tokens` must fit, and no more than `limit` ever come."""
    # No power of two: heads whose rows lie so far apart share places in the processor's caches, which costs 3%.
    return max(n_tokens, min(n_tokens + max(n_tokens // 4, _LEAST_ROOM), limit))


class KVCache:
    """Keys and values of `ids`, the tokens that have been run, per layer [1, n_kv_head, capacity, head_dim]."""

    def __init__(self, ort: Any, layout: CacheLayout, adapter: Adapter | None = None) -> None:
        self._ort = ort
        self._layout = layout
        self.ids: list[int] = []
        self.capacity = 0
        """Tokens the tensors have room for."""
        self.buffers: list[Any] = []
        """OrtValues in the order of graph_io.past_names; `reserve` makes them."""
        self.adapter = adapter
        """What `ids` were run with, and those after them will be; `use` changes it."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def bytes_per_token(self) -> int:
        return sum(map(prod, self._layout.shapes)) * np.dtype(self._layout.dtype).itemsize

    def reserve(self, n_tokens: int, limit: int) -> None:
        """Make `buffers` ready for a run after which there are `n_tokens` in all; `limit` is the context's length."""
        if not self._layout.shared:
            if not self.buffers or self.capacity != len(self):
                self._resize(len(self))
            return
        if n_tokens <= self.capacity:
            return
        self._resize(room_for(n_tokens, limit))

    def take(self, presents: Sequence[Any]) -> None:
        """The tensors that a run gave for a growing cache, in the place of those it read."""
        self.buffers = list(presents)
        self.capacity = int(presents[0].shape()[2])

    def use(self, adapter: Adapter | None) -> None:
        """Go on with this adapter; keys and values that another made are forgotten."""
        if adapter is not self.adapter:
            self.truncate(0)
            self.adapter = adapter

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens`; what lies behind them is overwritten, or cut off, when more are run."""
        del self.ids[n_tokens:]

    def keep_common_prefix(self, ids: Sequence[int]) -> int:
        """Truncate to the longest prefix shared with `ids`, and say how long it is."""
        n = 0
        for mine, wanted in zip(self.ids, ids, strict=False):
            if mine != wanted:
                break
            n += 1
        self.truncate(n)
        return n

    def copy(self, n_tokens: int | None = None) -> KVCache:
        """An independent cache of the same tokens, or of the first `n_tokens` of them."""
        twin = KVCache(self._ort, self._layout, self.adapter)
        twin.ids = self.ids[:n_tokens]
        twin.capacity, twin.buffers = self.capacity, list(self.buffers)
        if self._layout.shared:  # growing tensors are never written to, and may stay common
            twin._resize(max(len(twin), 1))
        return twin

    def tensors(self) -> Iterator[npt.NDArray[Any]]:
        """Keys and values of the tokens held, each [n_kv_head, tokens, head_dim], for use before the cache changes."""
        for buffer in self.buffers:
            yield np.ascontiguousarray(buffer.numpy()[0, :, : len(self)])

    def fill(self, ids: Sequence[int], tensors: Iterable[npt.NDArray[Any]], limit: int) -> None:
        """Hold `ids` and what `tensors` gave for them, in the place of what was held; `limit` as in `reserve`."""
        self._resize(room_for(len(ids) + 1, limit) if self._layout.shared else len(ids), tensors)
        self.ids = list(ids)

    def write_to(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Keep keys and values in `arrays` from now on, each [B, n_kv_head, capacity, head_dim] in the CPU's memory."""
        self.buffers = [self._ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0) for array in arrays]
        self.capacity = arrays[0].shape[2]

    def _resize(self, capacity: int, tensors: Iterable[npt.NDArray[Any]] | None = None) -> None:
        """Fresh tensors of `capacity` that start with the tokens held, or with `tensors`."""
        held = iter(self.tensors() if tensors is None else tensors)
        buffers = []
        for heads, width in self._layout.shapes:
            # Zeros are mapped lazily: room that is never used costs no memory.
            fresh = np.zeros((1, heads, capacity, width), self._layout.dtype)
            if (old := next(held, None)) is not None:
                fresh[0, :, : old.shape[1]] = old
            buffers.append(self._ort.OrtValue.ortvalue_from_numpy(fresh, self._layout.device, 0))
        self.buffers, self.capacity = buffers, capacity
