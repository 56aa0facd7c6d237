"""KV caches of what several chats begin with, such as a system message, so that each new one need not run it again."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from gptedge.runtime.adapter import Adapter
from gptedge.runtime.kv_cache import KVCache

SHORTEST = 32
"""Tokens that are worth copying: fewer are run in the time that looking for them takes."""
_MOST = 2
"""Beginnings kept; each takes the memory of its tokens."""


class Prefixes:
    """The beginnings that were used last. Thread-safe: caches in here are only read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[KVCache] = []  # the least recently used first

    def copy_for(self, ids: Sequence[int], adapter: Adapter | None) -> KVCache | None:
        """A new cache of the longest beginning of `ids` that is kept; None where none is long enough."""
        with self._lock:
            of_its_kind = [cache for cache in self._kept if cache.adapter is adapter]
            best = max(of_its_kind, key=lambda cache: common_prefix(cache.ids, ids), default=None)
            n = common_prefix(best.ids, ids) if best is not None else 0
            if best is None or n < SHORTEST:
                return None
            self._kept = [*(c for c in self._kept if c is not best), best]
        return best.copy(n)

    def keep(self, cache: KVCache, n_tokens: int) -> None:
        """Copy the first `n_tokens` of a cache that is not in use, unless they are few or known."""
        if n_tokens < SHORTEST or n_tokens > len(cache):
            return
        with self._lock:
            known = (c.ids for c in self._kept if c.adapter is cache.adapter)
            if any(common_prefix(ids, cache.ids) >= n_tokens for ids in known):
                return
            self._kept = [*self._kept, cache.copy(n_tokens)][-_MOST:]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
