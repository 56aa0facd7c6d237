"""Reading text strictly as UTF-8, with an error that says where it is not."""

from __future__ import annotations

from pathlib import Path

from gptedge.errors import DataError


def read_text(path: Path) -> str:
    """A file's text. Raises DataError when it is missing or not UTF-8."""
    try:
        return decode_utf8(Path(path).read_bytes(), path)
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from None


def decode_utf8(data: bytes, where: str | Path) -> str:
    """Text of UTF-8 bytes; DataError naming the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{where} is not UTF-8 text: byte {e.start} is 0x{data[e.start]:02x}; convert it first"
        ) from None
