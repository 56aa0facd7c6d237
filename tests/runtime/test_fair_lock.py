"""The session's lock goes round: a long prompt lets others take their turns between its pieces."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gptedge.bundle import open_bundle
from gptedge.runtime import session as session_module
from gptedge.runtime.fair_lock import FairLock
from gptedge.runtime.session import Session

pytestmark = pytest.mark.timeout(60)


def waiting(lock: FairLock, n: int) -> None:
    while len(lock._waiting) != n:
        time.sleep(0.001)


def start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_the_lock_goes_to_who_has_waited_longest() -> None:
    lock, order, threads = FairLock(), list[str](), list[threading.Thread]()

    def take(name: str) -> None:
        with lock:
            order.append(name)

    with lock:
        for n, name in enumerate("abc", 1):
            threads.append(start(lambda name=name: take(name)))
            waiting(lock, n)
    take("again at once")
    for thread in threads:
        thread.join(10)
    assert order == ["a", "b", "c", "again at once"]
    take("free")
    assert order[-1] == "free"


def test_waiting_may_end() -> None:
    """And who gave up is not waited for."""
    lock = FairLock()
    assert lock.acquire(0.01)
    assert not lock.acquire(0.01)
    lock.__exit__()
    assert lock.acquire(0.01)


def test_who_is_interrupted_while_waiting_leaves_the_queue() -> None:
    lock, end, main = FairLock(), threading.Event(), threading.get_ident()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def hold() -> None:
        with lock:
            waiting(lock, 1)
            signal.pthread_kill(main, signal.SIGINT)
            end.wait()

    try:
        thread = start(hold)
        while not lock._held:
            time.sleep(0.001)
        with pytest.raises(KeyboardInterrupt), lock:
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    end.set()
    thread.join(10)
    with lock:
        assert not lock._waiting


def test_a_prompt_lets_others_in_between_its_pieces(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 4)
    session, order = Session(open_bundle(tiny_bundle), threads=1), list[int]()
    call = session._call
    begun = threading.Event()

    def counted(graph: object, feeds: dict, *rest: object) -> object:
        order.append(feeds["input_ids"].size)
        begun.set()
        if len(order) == 1:
            waiting(session.lock, 1)
        return call(graph, feeds, *rest)

    monkeypatch.setattr(session, "_call", counted)
    prompt = start(lambda: session.prefill([5] * 12, session.new_cache()))
    begun.wait()
    session.run([7], session.new_cache())
    prompt.join(10)
    assert order == [4, 1, 4, 4]
