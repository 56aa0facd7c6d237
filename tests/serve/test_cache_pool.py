"""Which KV cache is lent to whom."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import pytest

from gptedge.runtime.kv_cache import CacheLayout, KVCache
from gptedge.runtime.prefixes import SHORTEST, common_prefix
from gptedge.serve.cache_pool import CachePool


def new_cache() -> KVCache:
    return KVCache(None, CacheLayout(shapes=(), dtype="float32", shared=True))


def run(pool: CachePool, ids: list[int]) -> KVCache:
    """Do with a cache what a reply does."""
    with pool.borrow(ids) as cache:
        cache.keep_common_prefix(ids)
        cache.ids[:] = ids
        return cache


@pytest.mark.parametrize(
    ("a", "b", "n"), [([], [], 0), ([1], [], 0), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([2, 1], [1, 2], 0)]
)
def test_common_prefix(a: list[int], b: list[int], n: int) -> None:
    assert common_prefix(a, b) == common_prefix(b, a) == n


def test_a_longer_prompt_gets_the_cache_of_its_beginning() -> None:
    pool = CachePool(new_cache, 4)
    chats = [[i] * 10 for i in range(4)]
    caches = [run(pool, chat) for chat in chats]
    assert len({id(c) for c in caches}) == 4
    for chat, cache in reversed(list(zip(chats, caches, strict=True))):
        assert run(pool, [*chat, 99]) is cache


def test_the_longest_common_prefix_wins() -> None:
    pool = CachePool(new_cache, 4)
    with pool.borrow([]) as short, pool.borrow([]) as long, pool.borrow([]) as short_too:
        short.ids[:] = [1, 2]
        long.ids[:] = [1, 2, 3, 4]
        short_too.ids[:] = [1, 2]
    with pool.borrow([1, 2, 3, 4, 5]) as taken:
        assert taken is long


def test_a_shared_beginning_does_not_rob_a_long_chat() -> None:
    pool = CachePool(new_cache, 2)
    system = [7] * 5
    first = run(pool, [*system, *range(100, 120)])
    second = run(pool, [*system, *range(200, 220)])
    assert first is not second
    assert len(first) == 25
    assert run(pool, [*system, *range(100, 120), 1]) is first


def test_a_large_shared_beginning_is_kept_for_the_next_chat() -> None:
    pool = CachePool(new_cache, 4)
    system = list(range(50))
    first = run(pool, [*system, 1, 2])
    with pool.borrow([*system, 3, 4]) as second:
        assert second is first


def test_the_least_recently_used_is_given_up() -> None:
    pool = CachePool(new_cache, 2)
    a, b = run(pool, [1] * 5), run(pool, [2] * 5)
    assert run(pool, [1] * 6) is a
    assert run(pool, [3] * 5) is b
    assert run(pool, [1] * 7) is a


def test_never_the_same_cache_to_two_at_once() -> None:
    pool = CachePool(new_cache, 2)
    run(pool, [1, 2, 3])
    with pool.borrow([1, 2, 3, 4]) as a, pool.borrow([1, 2, 3, 4]) as b:
        assert a is not b


def test_it_keeps_no_more_than_its_size_even_when_more_are_lent() -> None:
    pool = CachePool(new_cache, 2)
    with ExitStack() as stack:
        lent = [stack.enter_context(pool.borrow([i])) for i in range(5)]
        assert len({id(c) for c in lent}) == 5
    assert len(pool._idle) == 2


def test_a_cache_comes_back_after_an_error() -> None:
    pool = CachePool(new_cache, 1)
    cache = run(pool, [1, 2])
    with pytest.raises(ZeroDivisionError), pool.borrow([1, 2, 3]):
        raise ZeroDivisionError
    assert run(pool, [1, 2, 3]) is cache


def test_from_many_threads() -> None:
    pool = CachePool(new_cache, 3)
    lent: set[int] = set()
    lock, wrong = threading.Lock(), []

    def work(n: int) -> None:
        for i in range(200):
            with pool.borrow([n, i % 3]) as cache:
                with lock:
                    wrong.append(id(cache) in lent)
                    lent.add(id(cache))
                cache.ids[:] = [n, i % 3]
                with lock:
                    lent.discard(id(cache))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not any(wrong)
    assert len(wrong) == 600
    made: Any = pool._idle
    assert 1 <= len(made) <= 3


def test_a_long_cache_does_not_hide_a_shorter_one_that_continues() -> None:
    pool = CachePool(new_cache, 4)
    system = [7] * 20
    run(pool, [*system, *range(100, 200)])
    short = run(pool, [*system, 1])
    assert run(pool, [*system, 2]) is short


def test_a_shared_beginning_is_copied() -> None:
    """From a cache of which most would go, where it is long enough; the other stays as it is."""
    pool = CachePool(new_cache, 4)
    for n in (SHORTEST - 1, SHORTEST):
        system = [n] * n
        first = run(pool, [*system, *range(100, 300)])
        with pool.borrow([*system, 1]) as cache:
            assert cache is not first
            assert cache.ids == (system if n >= SHORTEST else [])
        assert len(first) == n + 200


@pytest.mark.parametrize("method", ["copy", "use"])
def test_no_memory_for_a_cache_costs_no_slot(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    pool = CachePool(new_cache, 2)
    system = [7] * SHORTEST
    run(pool, [*system, *range(100, 300)])
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, method, fail)
        for _ in range(3):
            with pytest.raises(MemoryError), pool.borrow([*system, 1]):
                pass
    with pool.borrow([1]) as a, pool.borrow([2]) as b:
        assert a is not b
    assert len(pool._idle) == 2
