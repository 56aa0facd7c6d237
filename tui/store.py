"""Conversations on disk: one JSON file each, written whole or not at all, readable by nobody but their owner.

Of two windows on one conversation neither overwrites the other: who finds that it has gone on writes to a new file.

Saving never raises: a full disk must not end a conversation. It says what prevented it instead.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gptedge.errors import DataError, UsageError
from gptedge.files import new_file, user_folder, write_json

FORMAT_VERSION = 1
MOVED = "this conversation has gone on in another window; what is said here is kept in a new file"

Messages = Sequence[Mapping[str, str]]


def chats_folder() -> Path:
    """Where this user's conversations are kept."""
    return user_folder("chats")


@dataclass(frozen=True)
class SavedChat:
    path: Path
    bundle: str
    messages: list[dict[str, str]]


def latest(folder: Path) -> SavedChat:
    """The conversation that was written to last. Raises UsageError when there is none, DataError when it is damaged."""
    newest = max(folder.glob("*.json"), key=lambda p: p.stat().st_mtime_ns, default=None)
    if newest is None:
        raise UsageError(f"there is no conversation to resume in {folder}; start one without --resume")
    return read(newest)


def read(path: Path) -> SavedChat:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(f"{path} is not a saved conversation ({e}); move it away and resume again") from None
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path} is not a conversation this gptedge reads; move it away and resume again")
    from gptedge.conversation import checked_messages  # numpy: 0.1 s

    return SavedChat(path, str(data.get("bundle", "")), checked_messages(data.get("messages")))


class ChatFile:
    """The file of one conversation. It appears with the user's first message, and goes when that is taken back.

    Safe from any thread.
    """

    def __init__(self, path: Path, bundle: str | Path, saved: Messages = ()) -> None:
        """`saved` is what the file holds already."""
        self.path = path
        self.bundle = str(Path(bundle).resolve())  # wherever the conversation is resumed
        self._saved = _copy(saved)
        self._began_here = not saved
        self._news: str | None = None
        self._lock = threading.Lock()

    @classmethod
    def new(cls, folder: Path, bundle: str | Path) -> ChatFile:
        return cls(folder / _new_name(), bundle)

    @property
    def exists(self) -> bool:
        """Something of this conversation is on disk."""
        return bool(self._saved)

    def save(self, messages: Messages) -> str | None:
        """Write `messages` unless they are what was written last. Returns None, or what prevented it in one line."""
        with self._lock:
            try:
                if not _turns(messages):
                    self._take_back()
                elif list(messages) != self._saved:
                    self._write(_copy(messages))
            except OSError as e:
                return f"this conversation cannot be saved in {self.path.parent}: {e.strerror or e}"
            return None

    def news(self) -> str | None:
        """What the user should know of where the conversation is kept; it is said once."""
        with self._lock:
            news, self._news = self._news, None
            return news

    def _take_back(self) -> None:
        """Nothing was said after all."""
        if self._saved and self._began_here:
            if not self._is_another():
                self.path.unlink(missing_ok=True)
            self._saved = []

    def _is_another(self) -> bool:
        """The file holds something else than what this chat last read or wrote. The system message may be changed."""
        try:
            return _turns(json.loads(self.path.read_bytes())["messages"]) != _turns(self._saved)
        except FileNotFoundError:
            return False
        except (ValueError, LookupError, TypeError):  # no conversation at all
            return True

    def _write(self, messages: list[dict[str, str]]) -> None:
        if self._is_another():
            self.path, self._began_here, self._news = self.path.with_name(_new_name()), True, MOVED
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        value: dict[str, Any] = {"format_version": FORMAT_VERSION, "bundle": self.bundle, "messages": messages}
        with new_file(self.path) as work:
            work.touch(mode=0o600)
            write_json(work, value)
        self._saved = messages


def _new_name() -> str:
    return f"{datetime.now():%Y-%m-%d-%H%M%S}-{uuid.uuid4().hex[:6]}.json"


def _turns(messages: Messages) -> list[Mapping[str, str]]:
    """All but the system message."""
    return [m for m in messages if m["role"] != "system"]


def _copy(messages: Messages) -> list[dict[str, str]]:
    return [dict(m) for m in messages]
