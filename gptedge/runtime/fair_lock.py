"""A lock that goes to whoever has waited longest.

`threading.Lock` does not: who gives it up and asks for it again at once, as a loop over a prompt's pieces does, mostly
gets it again, and others wait until that loop ends.
"""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """For `with`. Not re-entrant."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()
        """For each thread that waits a lock, closed until its turn comes."""

    def __enter__(self) -> None:
        self.acquire()

    def acquire(self, seconds: float = -1) -> bool:
        """Wait for it, at most so long; whether it is held then."""
        with self._guard:
            if not self._held:
                self._held = True
                return True
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            if turn.acquire(timeout=seconds):
                return True
        except BaseException:  # Ctrl+C: the others must not wait for one who has left
            self._leave(turn)
            raise
        self._leave(turn)
        return False

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._pass_on()

    def _pass_on(self) -> None:
        if self._waiting:
            self._waiting.popleft().release()  # it stays held: by the next
        else:
            self._held = False

    def _leave(self, turn: threading.Lock) -> None:
        with self._guard:
            if turn in self._waiting:
                self._waiting.remove(turn)
            else:
                self._pass_on()
