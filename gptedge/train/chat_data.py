"""Reading what a model is fine-tuned on: conversations, pairs of instruction and response, and plain text.

    chat.jsonl   {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}    OpenAI's format
                 {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}        ShareGPT's
                 {"instruction": …, "input": …, "output": …}, {"prompt": …, "completion": …}, …         pairs
                 {"text": …}                                                                            plain text
    rows.json    one array of the same
    notes.txt    plain text, a file at a time

Each also as .gz. Bytes that are not UTF-8 become U+FFFD, and are counted. It knows nothing of tokens or templates.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from gptedge.errors import DataError
from gptedge.text import counted
from gptedge.train.corpus import JSON_LINES, files_of, is_gzip, suffix_of, without_mark

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

# Other names of the roles: OpenAI's newer models, and ShareGPT.
_ROLES = {
    "developer": SYSTEM,
    "human": USER,
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), ASSISTANT),
}
# Names that data sets give to the two sides of a pair, and to what stands before it.
_QUESTIONS = ("instruction", "prompt", "question", "query", "user", "input")
_REPLIES = ("output", "response", "completion", "answer", "reply", "assistant", "target")
_SYSTEMS = ("system", "system_prompt")

_ARRAYS, _TEXTS, _TABLES = frozenset({".json"}), frozenset({".txt", ".md"}), frozenset({".csv", ".tsv"})
_SHOWN = 3  # of the lines that are left out


@dataclass(frozen=True)
class Message:
    role: str
    """system, user or assistant."""
    content: str
    learn: bool = True
    """Whether an assistant's message is learned, rather than only read (OpenAI's `weight`)."""


Conversation: TypeAlias = tuple[Message, ...]
Record: TypeAlias = Conversation | str
"""A conversation, or plain text."""


@dataclass
class Records:
    """What was read, and what was wrong with it."""

    items: list[Record] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    """For each record left out, where it is and why."""
    replaced: int = 0
    """Characters that stand for bytes that were not UTF-8."""

    def notes(self) -> list[str]:
        """Lines for people."""
        notes = [f"left out {reason}" for reason in self.bad[:_SHOWN]]
        if len(self.bad) > _SHOWN:
            notes.append(f"left out {len(self.bad) - _SHOWN} more")
        if self.replaced:
            notes.append(f"read {counted(self.replaced, 'invalid UTF-8 sequence')} as U+FFFD")
        return notes


class _BadRow(ValueError):
    """Why a record cannot be used."""


def read_records(paths: Sequence[Path], *, skip_bad: bool = False, without: Path | None = None) -> Records:
    """Every record of the files, folders walked in the order of names; `without`, the output's folder, is left out.

    Raises DataError at the first that cannot be used, with its line and the reason; `skip_bad` leaves it out instead.
    Raises it too when a file cannot be read, or nothing is left.
    """
    found = Records()
    for path in (file for given in paths for file in files_of(Path(given), _is_known, without)):
        for where, make in _rows(path, found):
            try:
                found.items.append(make())
            except _BadRow as e:
                if not skip_bad:
                    raise DataError(f"{path}{where}: {e}; mend it, or leave such records out with --skip-bad") from None
                found.bad.append(f"{path.name}{where}: {e}")
    if not found.items:
        why = f"no record is good, the first: {found.bad[0]}" if found.bad else "there are no records"
        raise DataError(f"nothing to learn from in {', '.join(map(str, paths))}: {why}")
    return found


# ---- files ---------------------------------------------------------------------------------------------------------


def _is_known(file: Path) -> bool:
    return suffix_of(file) in JSON_LINES | _ARRAYS | _TEXTS


def _rows(path: Path, found: Records) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Where each record stands in the file, and how to make it."""
    kind = suffix_of(path)
    if kind in JSON_LINES:
        for number, line in enumerate(_lines(path, found), 1):
            if line.strip():
                yield f", line {number}", partial(_parsed, line)
        return
    text = "".join(_lines(path, found))
    if kind in _ARRAYS:
        for number, row in enumerate(_array(path, text), 1):
            yield f", entry {number}", partial(_record, row)
        return
    if "\0" in text:
        raise DataError(f"{path} holds NUL bytes, which no text does; give text, or JSON lines")
    if kind in _TABLES:
        raise DataError(f"{path} is a table; make JSON lines of it, or call it .txt to learn it as it stands")
    if kind not in _TEXTS and text.lstrip()[:1] in ("{", "["):
        raise DataError(f"{path} looks like JSON; call it {path.name}.jsonl, or .txt to learn it as it stands")
    if text.strip():
        yield "", lambda: text


def _lines(path: Path, found: Records) -> Iterator[str]:
    """Lines as \\n parts them; JSON may hold other characters that Python would part lines at."""
    try:
        with gzip.open(path) if is_gzip(path) else path.open("rb") as f:
            for number, line in enumerate(f):
                yield _decode(without_mark(path, line) if number == 0 else line, found)
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path} cannot be read: {e}") from None


def _decode(line: bytes, found: Records) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("utf-8", errors="replace")
        found.replaced += text.count("\N{REPLACEMENT CHARACTER}") - line.count("\N{REPLACEMENT CHARACTER}".encode())
        return text


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise _BadRow(f"not JSON ({e})") from None


def _array(path: Path, text: str) -> list[Any]:
    try:
        value = _parse(text) if text.strip() else []
    except _BadRow as e:
        raise DataError(f"{path}: {e}; for one record a line, call it {path.with_suffix('.jsonl').name}") from None
    return value if isinstance(value, list) else [value]


# ---- records -------------------------------------------------------------------------------------------------------


def _record(row: Any) -> Record:
    """The record that a JSON value is. Raises _BadRow."""
    if not isinstance(row, Mapping):
        raise _BadRow(f"a JSON object is needed, not {type(row).__name__}")
    for key, read in _FORMS.items():
        if key in row:
            return read(row[key])
    question, reply = _first(row, _QUESTIONS), _first(row, _REPLIES)
    if question and reply:
        return _pair(row, question, reply)
    if "text" in row:
        text = _text(row["text"], "text")
        if not text.strip():
            raise _BadRow("text is empty")
        return text
    shown = ", ".join(map(str, list(row)[:8])) or "none"
    raise _BadRow(f"its keys are {shown}; messages, a pair such as prompt and completion, or text is needed")


def _parsed(line: str) -> Record:
    return _record(_parse(line.rstrip()))


def _first(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _pair(row: Mapping[str, Any], question: str, reply: str) -> Conversation:
    asked = _text(row[question], question)
    extra = row.get("input")
    if question != "input" and extra:  # Alpaca's: what the instruction is about
        asked = f"{asked}\n\n{_text(extra, 'input')}"
    messages = [Message(USER, asked), Message(ASSISTANT, _text(row[reply], reply))]
    system = _first(row, _SYSTEMS)
    if system and row[system]:
        messages.insert(0, Message(SYSTEM, _text(row[system], system)))
    return _checked(messages)


def _messages(value: Any) -> Conversation:
    """OpenAI's: {"role", "content"}; with "weight": 0, a reply is not learned."""
    return _checked([_message(i, m, "role", "content") for i, m in enumerate(_list(value, "messages"), 1)])


def _turns(value: Any) -> Conversation:
    """ShareGPT's: {"from", "value"}."""
    rows = _list(value, "conversations")
    keys = ("role", "content") if rows and isinstance(rows[0], Mapping) and "role" in rows[0] else ("from", "value")
    return _checked([_message(i, m, *keys) for i, m in enumerate(rows, 1)])


_FORMS: dict[str, Callable[[Any], Conversation]] = {"messages": _messages, "conversations": _turns}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _BadRow(f"{name} is {type(value).__name__}, not a list")
    return value


def _message(number: int, value: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(value, Mapping):
        raise _BadRow(f"message {number} is not an object with {role_key} and {content_key}")
    stated = value.get(role_key)
    role = _ROLES.get(stated, stated) if isinstance(stated, str) else None
    if role not in (SYSTEM, USER, ASSISTANT):
        raise _BadRow(f"message {number} has the role {stated!r}; known are {SYSTEM}, {USER} and {ASSISTANT}")
    if value.get("tool_calls"):
        raise _BadRow(f"message {number} calls tools, which are not learned")
    return Message(role, _text(value.get(content_key), f"message {number}"), value.get("weight") != 0)


def _text(value: Any, what: str) -> str:
    """A string, or OpenAI's list of parts that are text."""
    if isinstance(value, list) and value and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise _BadRow(f"{what} is {'missing' if value is None else type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"{what} holds half of a surrogate pair, which no text can") from None
    return value


def _checked(messages: Sequence[Message]) -> Conversation:
    """A system message or none, then user and assistant by turns, the assistant last, and nobody silent."""
    expected = USER
    for number, m in enumerate(messages, 1):
        if m.role == SYSTEM and number == 1:
            continue
        if m.role != expected:
            raise _BadRow(f"message {number} is the {m.role}'s where the {expected}'s turn is")
        if not m.content.strip():
            raise _BadRow(f"message {number}, the {m.role}'s, is empty")
        expected = ASSISTANT if expected == USER else USER
    if not messages or messages[-1].role != ASSISTANT:
        raise _BadRow(f"the last message is not the {ASSISTANT}'s, so that there is no reply to learn")
    if not any(m.learn for m in messages if m.role == ASSISTANT):
        raise _BadRow("every reply has the weight 0, so that there is none to learn")
    return tuple(messages)
