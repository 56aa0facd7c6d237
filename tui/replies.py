"""The threads beside the screen: one loads the model, one at a time makes a reply. They tell the app by messages only.

A thread says that text has come, and not again before the app has taken it all, which it does every `BATCH_SECONDS`:
however fast the text comes, and however slow the screen is, no more than one message waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from textual.message import Message

from gptedge.tui.store import ChatFile
from gptedge.tui.unfinished import Unfinished

if TYPE_CHECKING:
    from gptedge import Chat, Model, Result, Stream

BATCH_SECONDS = 0.03

Post = Callable[[Message], object]


@dataclass
class Loaded(Message):
    model: Model


@dataclass
class LoadFailed(Message):
    error: Exception


@dataclass
class TextCame(Message):
    """There is text to `take` from the reply."""

    reply: Reply


@dataclass
class Ended(Message):
    """The reply is over. `result` is what the chat has taken into its history, None when it took nothing."""

    result: Result | None
    error: Exception | None
    not_saved: str | None
    """What prevented saving the conversation."""
    news: str | None
    """What else there is to say of its file."""


class Loader(threading.Thread):
    """Loads a model, and posts Loaded or LoadFailed."""

    def __init__(self, load: Callable[[], Model], post: Post) -> None:
        super().__init__(name="gptedge-load", daemon=True)
        self._load, self._post = load, _from_thread(post)
        self.model: Model | None = None

    def run(self) -> None:
        try:
            self.model = self._load()
        except Exception as e:  # a thread has no caller: the app is told, and ends with it
            self._post(LoadFailed(e))
        else:
            self._post(Loaded(self.model))


class Reply(threading.Thread):
    """One reply: posts TextCame while it comes and Ended when it is over, and keeps the file up to date."""

    def __init__(self, chat: Chat, question: str | None, post: Post, file: ChatFile, **changes: object) -> None:
        """`question` None answers the last one anew. `changes` are sampling parameters for this reply."""
        super().__init__(name="gptedge-reply", daemon=True)
        self.chat, self.question = chat, question
        self._post, self._file = _from_thread(post), file
        self._reply = Unfinished(chat, question, file, **changes)
        self._cancelled = threading.Event()
        self._left = False
        """Nobody is there to whom the question could be given back."""
        self._stream: Stream | None = None
        self._taken = 0
        """How many of its pieces the app has."""
        self._told = False
        """The app knows that there is more."""
        self._lock = threading.Lock()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Stop after the token that is being computed. Returns at once."""
        self._cancelled.set()
        if self._stream is not None:
            self._stream.cancel()

    def leave(self) -> None:
        """Cancel, and keep the question even where nothing of an answer has come."""
        self._left = True
        self.cancel()

    def take(self) -> str:
        """The text that has come since the last time."""
        with self._lock:
            pieces = self._reply.pieces[self._taken :]
            self._taken, self._told = self._taken + len(pieces), False
        return "".join(pieces)

    def messages(self) -> list[dict[str, str]]:
        """The conversation, with what has come of a reply that is under way or was left unanswered."""
        under_way = self.is_alive() or (self._left and self._reply.kept is None)
        return self._reply.messages() if under_way else self.chat.messages

    def run(self) -> None:
        error: Exception | None = None
        try:
            with self._reply.asked() as self._stream:
                if self._cancelled.is_set():  # before there was a stream to cancel
                    self._stream.cancel()
                self._read(self._stream)
        except Exception as e:  # a thread has no caller: the app shows it in the conversation
            error = e
        unanswered = self._left and self._reply.kept is None
        not_saved = self._file.save(self._reply.messages() if unanswered else self.chat.messages)
        self._post(Ended(self._reply.kept, error, not_saved, self._file.news()))

    def _read(self, stream: Stream) -> None:
        for _ in self._reply.read(stream):
            with self._lock:
                tell, self._told = not self._told, True
            if tell:
                self._post(TextCame(self))


def _from_thread(post: Post) -> Post:
    """`post` that does nothing once the app is gone."""

    def quietly(message: Message) -> None:
        with suppress(RuntimeError):  # its event loop is closed
            post(message)

    return quietly


def join_all(threads: Sequence[threading.Thread | None], seconds: float) -> None:
    """Wait for threads to end, `seconds` in all."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        if thread is not None and thread.ident is not None:
            thread.join(max(0.0, deadline - time.monotonic()))
