"""Conversations on disk: one JSON file each, written whole or not at all, readable by nobody but their owner.

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
    """The file of one conversation. It appears with the user's first message. Safe from any thread."""

    def __init__(self, path: Path, bundle: str | Path, saved: Messages = ()) -> None:
        """`saved` is what the file holds already."""
        self.path = path
        self.bundle = str(Path(bundle).resolve())  # wherever the conversation is resumed
        self._saved = _copy(saved)
        self._lock = threading.Lock()

    @classmethod
    def new(cls, folder: Path, bundle: str | Path) -> ChatFile:
        name = f"{datetime.now():%Y-%m-%d-%H%M%S}-{uuid.uuid4().hex[:6]}.json"
        return cls(folder / name, bundle)

    @property
    def exists(self) -> bool:
        """Something of this conversation is on disk."""
        return bool(self._saved)

    def save(self, messages: Messages) -> str | None:
        """Write `messages` unless they are what was written last. Returns None, or what prevented it in one line."""
        with self._lock:
            if list(messages) == self._saved or all(m["role"] == "system" for m in messages):
                return None
            try:
                self._write(_copy(messages))
            except OSError as e:
                return f"this conversation cannot be saved in {self.path.parent}: {e.strerror or e}"
            return None

    def _write(self, messages: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        value: dict[str, Any] = {"format_version": FORMAT_VERSION, "bundle": self.bundle, "messages": messages}
        with new_file(self.path) as work:
            work.touch(mode=0o600)
            write_json(work, value)
        self._saved = messages


def _copy(messages: Messages) -> list[dict[str, str]]:
    return [dict(m) for m in messages]
