"""A few recent KV caches, so that the next turn of a chat does not run its whole history again.

Does: lends the idle cache that has most in common with a prompt, if most of it would stay, to one borrower at a time,
or a copy of what another has in common with it, such as a system message; forgets the least recently used. Does not:
know which chat a request belongs to; a cache is recognised by its tokens alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gptedge.runtime.adapter import Adapter
from gptedge.runtime.kv_cache import KVCache
from gptedge.runtime.prefixes import SHORTEST, common_prefix


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
        try:
            cache.use(adapter)
            yield cache
        finally:
            self._give_back(cache)

    def _take(self, prompt: Sequence[int], adapter: Adapter | None) -> KVCache:
        with self._lock:
            cache = self._best(prompt, adapter)
            self._n_lent += 1  # only now: there may be no memory for another cache
            return cache

    def _best(self, prompt: Sequence[int], adapter: Adapter | None) -> KVCache:
        alike = {i: common_prefix(c.ids, prompt) for i, c in enumerate(self._idle) if c.adapter is adapter}
        whole = [i for i, n in alike.items() if _continues(self._idle[i].ids, n)]
        if whole:
            return self._idle.pop(max(whole, key=alike.__getitem__))
        best = max(alike, key=alike.__getitem__, default=None)
        made = self._idle[best].copy(alike[best]) if best is not None and alike[best] >= SHORTEST else None
        if self._n_lent + len(self._idle) < self._size or not self._idle:
            return made or self._new_cache()
        oldest = self._idle.pop(0)
        return made or oldest

    def _give_back(self, cache: KVCache) -> None:
        with self._lock:
            self._n_lent -= 1
            self._idle.append(cache)
            del self._idle[: max(0, self._n_lent + len(self._idle) - self._size)]


def _continues(held: Sequence[int], alike: int) -> bool:
    """Whether most of a cache would stay.

    Chats share their template's first tokens, and must not rob one another for those.
    """
    return 0 < len(held) <= 2 * alike
