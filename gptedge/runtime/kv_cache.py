"""The KV cache of one conversation: buffers that serve as the graph's past and present at once.

GroupQueryAttention appends to a buffer in place when it is bound as both, so a step copies nothing. Buffers hold more
room than tokens and double when full. Not thread-safe: a cache belongs to one conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_FIRST_CAPACITY = 256  # tokens


class KVCache:
    """Keys and values of `ids`, the tokens that have been run, per layer [1, n_kv_head, capacity, head_dim]."""

    def __init__(self, ort: Any, *, n_layer: int, n_kv_head: int, head_dim: int, dtype: npt.DTypeLike) -> None:
        self._ort = ort
        self._shape = (1, n_kv_head, head_dim)
        self._dtype = np.dtype(dtype)
        self._n_buffers = 2 * n_layer
        self.ids: list[int] = []
        self.capacity = 0
        self.buffers: list[Any] = []
        """OrtValues in the order of graph_io.past_names."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def bytes_per_token(self) -> int:
        batch, heads, width = self._shape
        return self._n_buffers * batch * heads * width * self._dtype.itemsize

    def reserve(self, n_tokens: int, limit: int) -> None:
        """Make room for `n_tokens` in all, doubling up to `limit`, the context's length."""
        if n_tokens <= self.capacity:
            return
        capacity = max(self.capacity, _FIRST_CAPACITY)
        while capacity < n_tokens:
            capacity *= 2
        self._grow(max(n_tokens, min(capacity, limit)))

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens`; what lies behind them is overwritten later."""
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

    def copy(self) -> KVCache:
        """An independent cache of the same tokens."""
        _, heads, width = self._shape
        twin = KVCache(self._ort, n_layer=self._n_buffers // 2, n_kv_head=heads, head_dim=width, dtype=self._dtype)
        twin.ids = list(self.ids)
        twin.capacity, twin.buffers = self.capacity, list(self.buffers)
        twin._grow(max(len(self), 1))
        return twin

    def _grow(self, capacity: int) -> None:
        """Fresh buffers of `capacity` that start with the tokens held."""
        batch, heads, width = self._shape
        used = len(self)
        old = self.buffers
        self.buffers = []
        for i in range(self._n_buffers):
            # Zeros are mapped lazily: room that is never used costs no memory.
            fresh = np.zeros((batch, heads, capacity, width), self._dtype)
            if old:
                fresh[:, :, :used] = old[i].numpy()[:, :, :used]
            self.buffers.append(self._ort.OrtValue.ortvalue_from_numpy(fresh))
        self.capacity = capacity
