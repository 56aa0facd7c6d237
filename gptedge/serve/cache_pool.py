"""A few recent KV caches, so that the next turn of a chat does not run its whole history again.

Does: lends the idle cache that has most in common with a prompt, to one borrower at a time; forgets the least recently
used. Does not: know which chat a request belongs to; a cache is recognised by its tokens alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gptedge.runtime.adapter import Adapter
from gptedge.runtime.kv_cache import KVCache


class CachePool:
    """At most `size` caches, lent or idle, as long as at most `size` are lent. Thread-safe."""

    def __init__(self, new_cache: Callable[[], KVCache], size: int) -> None:
        self._new_cache = new_cache
        self._size = size
        self._lock = threading.Lock()
        self._idle: list[KVCache] = []  # least recently used first
        self._n_lent = 0

    @contextmanager
    def borrow(self, prompt: Sequence[int], adapter: Adapter | None = None) -> Iterator[KVCache]:
        """The best cache there is for `prompt`; what it holds beyond their common prefix is the borrower's to drop."""
        cache = self._take(prompt, adapter)
        cache.use(adapter)
        try:
            yield cache
        finally:
            self._give_back(cache)

    def _take(self, prompt: Sequence[int], adapter: Adapter | None) -> KVCache:
        with self._lock:
            self._n_lent += 1
            of_its_kind = [cache for cache in self._idle if cache.adapter is adapter]
            best = max(of_its_kind, key=lambda cache: common_prefix(cache.ids, prompt), default=None)
            if best is not None and _continues(best.ids, prompt):
                return self._remove(best)
            if self._n_lent + len(self._idle) <= self._size or not self._idle:
                return self._new_cache()
            return self._remove(self._idle[0])

    def _remove(self, cache: KVCache) -> KVCache:
        self._idle = [c for c in self._idle if c is not cache]
        return cache

    def _give_back(self, cache: KVCache) -> None:
        with self._lock:
            self._n_lent -= 1
            self._idle.append(cache)
            del self._idle[: max(0, self._n_lent + len(self._idle) - self._size)]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _continues(held: Sequence[int], prompt: Sequence[int]) -> bool:
    """Whether most of a cache would stay.

    Chats share their template's first tokens, and must not rob one another for those.
    """
    return 0 < len(held) <= 2 * common_prefix(held, prompt)
