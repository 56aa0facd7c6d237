"""Text, strictly: files must be UTF-8, with an error that says where not, and arguments text that UTF-8 can hold."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from gptedge.errors import DataError, UsageError


def checked_text(value: object, name: str) -> str:
    """`value`, which must be text. Raises UsageError, or DataError for a lone surrogate."""
    if not isinstance(value, str):
        raise UsageError(f"{name} is {repr(value)[:60]}; it must be text (str)")
    check_scalars(value)
    return value


def check_scalars(text: str) -> None:
    """Raise DataError if `text` holds a lone surrogate, which no UTF-8 text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            f"text has a lone surrogate U+{ord(text[e.start]):04X} at character {e.start}; decode its source as UTF-8"
        ) from None


def read_text(path: Path) -> str:
    """A file's text, without the byte-order mark that some editors begin it with.

    Raises DataError when it is missing or not UTF-8."""
    try:
        return decode_utf8(Path(path).read_bytes(), path).removeprefix("\ufeff")
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from None


def counted(count: int, noun: str) -> str:
    """`1 document`, `1,200 documents`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def decode_utf8(data: bytes, where: str | Path) -> str:
    """Text of UTF-8 bytes; DataError naming the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{where} is not UTF-8 text: byte {e.start} is 0x{data[e.start]:02x}; convert it first"
        ) from None


_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def visible(text: str) -> str:
    """Text that cannot move a cursor, colour a terminal or turn a line around: what is not printable is escaped."""
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in text)


_CONTROLS = {c: f"\\u{{{c:x}}}" for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"} | {13: ""}
"""Carriage returns stand before line breaks, as a rule: shown, they would only disturb."""


def without_controls(text: str) -> str:
    """Text of several lines for a terminal, which could obey it: clear its screen, set the clipboard."""
    return text.translate(_CONTROLS)


def for_output(text: str, file: TextIO) -> str:
    """`text` for a file or a pipe, and `without_controls` for a terminal."""
    return without_controls(text) if file.isatty() else text
