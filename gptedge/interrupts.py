"""Holding Ctrl+C back where it would do harm: an extension module that is interrupted while it loads can crash."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_HANGUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
"""A terminal that is closed, a connection that is lost."""
KILLS = (signal.SIGTERM, *_HANGUP)
_SIGNALS = (signal.SIGINT, *KILLS)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl+C and polite kills inside the block are handled at its end. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
    if came:
        signal.raise_signal(came[0])


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl+C is noted, not raised, so that no step is left half done; a second one is raised at once.

    Polite kills too, where Python handles them. Yields a function that says whether one came. Outside the main thread,
    where no signals arrive, and in a program that ignores them, it never does.
    """
    came = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        for number in before:
            signal.signal(number, signal.default_int_handler)

    before = {number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
