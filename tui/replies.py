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

from gptedge.errors import UsageError
from gptedge.tui.store import ChatFile

if TYPE_CHECKING:
    from gptedge import Chat, Model, Result, Stream

BATCH_SECONDS = 0.03
SAVE_SECONDS = 2.0
"""How often a reply under way is written to the conversation's file."""

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
        self.chat, self.question, self._changes = chat, question, changes
        self._post, self._file = _from_thread(post), file
        self._cancelled = threading.Event()
        self._stream: Stream | None = None
        self._text: list[str] = []
        self._taken = 0
        """How many of them the app has."""
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

    def take(self) -> str:
        """The text that has come since the last time."""
        with self._lock:
            text = "".join(self._text[self._taken :])
            self._taken, self._told = len(self._text), False
            return text

    def so_far(self) -> list[dict[str, str]]:
        """The conversation with what has come of this reply."""
        messages = [dict(m) for m in self.chat.messages]
        if self.question is not None:
            messages.append({"role": "user", "content": self.question})
        elif messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return [*messages, {"role": "assistant", "content": text}] if (text := "".join(self._text)) else messages

    def run(self) -> None:
        error: Exception | None = None
        try:
            self._stream = self._open()
            if self._cancelled.is_set():  # before there was a stream to cancel
                self._stream.cancel()
            with self._stream:
                self._read(self._stream)
        except Exception as e:  # a thread has no caller: the app shows it in the conversation
            error = e
        result = _kept(self._stream)
        self._post(Ended(result, error, self._file.save(self.chat.messages)))

    def _open(self) -> Stream:
        if self.question is None:
            return self.chat.regenerate(**self._changes)
        self._file.save(self.so_far())
        return self.chat.stream(self.question, **self._changes)

    def _read(self, stream: Stream) -> None:
        saved = time.monotonic()
        for chunk in stream:
            with self._lock:
                self._text.append(chunk.text)
                tell, self._told = not self._told, True
            if tell:
                self._post(TextCame(self))
            if self.question is not None and time.monotonic() - saved >= SAVE_SECONDS:
                saved = time.monotonic()
                self._file.save(self.so_far())


def _kept(stream: Stream | None) -> Result | None:
    """What a chat takes into its history: a result with tokens."""
    if stream is None:
        return None
    with suppress(UsageError):
        return stream.result if stream.result.token_ids else None
    return None


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
