"""An interrupt inside the block waits for its end; outside the main thread nothing changes."""

from __future__ import annotations

import signal
import threading

import pytest

from gptedge.interrupts import interrupts_held


def interrupted_inside(after: list[str]) -> None:
    with interrupts_held():
        signal.raise_signal(signal.SIGINT)
        after.append("reached")


def test_interrupt_comes_at_the_end() -> None:
    after: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted_inside(after)
    assert after == ["reached"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_is_left_alone() -> None:
    handlers = []

    def work() -> None:
        with interrupts_held():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
