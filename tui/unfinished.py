"""A reply that is being made, and the conversation's file meanwhile: what the app and the line by line chat share.

Knows nothing of screens or threads. Does not import Textual.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from gptedge.errors import UsageError
from gptedge.tui.store import ChatFile

if TYPE_CHECKING:
    from gptedge import Chat, Result, Stream

SAVE_SECONDS = 2.0
"""How often a reply under way is written to the conversation's file."""


class Unfinished:
    """A reply from its question to its end. The question is on disk once it is accepted, and then what has come.

    A reply that is made anew touches neither the file nor the reply there was until it is complete.
    """

    def __init__(self, chat: Chat, question: str | None, file: ChatFile | None, **changes: object) -> None:
        """`question` None answers the last one anew. `changes` are sampling parameters for this reply."""
        self.chat, self.question, self._file, self._changes = chat, question, file, changes
        self.pieces: list[str] = []
        self.kept: Result | None = None
        """At the end, what the chat has taken into its history."""
        self._before = [dict(m) for m in chat.messages]

    @property
    def replaces(self) -> bool:
        """There is a whole reply that this one is to take the place of."""
        return self.question is None and bool(self._before) and self._before[-1]["role"] == "assistant"

    def messages(self) -> list[dict[str, str]]:
        """The conversation as it is to be kept if nothing more comes."""
        messages = [dict(m) for m in self._before]
        if self.replaces:
            return messages
        if self.question is not None:
            messages.append({"role": "user", "content": self.question})
        return [*messages, {"role": "assistant", "content": text}] if (text := "".join(self.pieces)) else messages

    @contextmanager
    def asked(self) -> Iterator[Stream]:
        """The stream to `read`, closed at the end. What the question is refused with is raised before it is saved."""
        stream = self._ask()
        try:
            with stream:
                yield stream
        finally:
            self._end(stream)

    def read(self, stream: Stream) -> Iterator[str]:
        """The reply piece by piece."""
        self._save()
        saved = time.monotonic()
        for chunk in stream:
            self.pieces.append(chunk.text)
            yield chunk.text
            if time.monotonic() - saved >= SAVE_SECONDS:
                saved = time.monotonic()
                self._save()

    def _ask(self) -> Stream:
        if self.question is None:
            return self.chat.regenerate(**self._changes)
        return self.chat.stream(self.question, **self._changes)

    def _end(self, stream: Stream) -> None:
        """Let no part of a reply take the place of a whole one."""
        with suppress(UsageError):  # it was never read
            self.kept = stream.result if stream.result.token_ids else None
        if self.kept is not None and self.replaces and self.kept.finish_reason == "cancelled":
            self.chat.load_dict({"messages": self._before})
            self.kept = None

    def _save(self) -> None:
        if self._file is not None:
            self._file.save(self.messages())  # what prevents it is said at the end
