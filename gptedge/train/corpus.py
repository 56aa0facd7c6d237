"""Text as people have it (files, folders, JSONL, gzip), read in pieces, so that a corpus needs no memory of its size.

A document is a text file, or the "text" of a line of a .jsonl file. Bytes that are not UTF-8 become U+FFFD and are
counted; broken lines of JSONL are refused, or left out and counted. Only a line of JSONL is ever held whole.
Chats are not read here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from gptedge.errors import DataError, UsageError
from gptedge.text import counted

_SUFFIXES = ".txt .text .md .markdown .rst .tex .html .py .js .ts .java .c .h .cpp .go .rs .rb .sh"
JSON_LINES = frozenset({".jsonl", ".ndjson", ".jsonlines"})
TEXT_SUFFIXES = JSON_LINES.union(_SUFFIXES.split())
"""What is read of a folder, each also with .gz behind it. A file that is named itself is read whatever it is called."""

PIECE = 1 << 20
"""Characters in a piece of a document, at most; bytes read at a time."""

_SEARCHED = 4096  # characters before the end of a piece in which a gap is looked for
_REPLACEMENT = "\ufffd"
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")  # where no pre-tokenizer has a word on both sides
_SURROGATE = re.compile("[\ud800-\udfff]")


class Piece(NamedTuple):
    """Some of a document's text; a document is all the pieces up to one that ends it."""

    text: str
    ends: bool


Corpus = Callable[[], Iterator[Piece]]
"""Each call reads the same text from its beginning."""


@dataclass
class Tally:
    """What was mended or left out in one pass."""

    replaced: int = 0
    """Invalid sequences of bytes, and halves of surrogate pairs."""
    empty: int = 0
    """Documents without text."""
    bad: int = 0
    """Broken lines of JSONL."""
    first_bad: str = ""

    def lines(self) -> list[str]:
        """What a person should know of it."""
        said = []
        if self.replaced:
            said.append(f"replaced {counted(self.replaced, 'invalid UTF-8 sequence')} with U+FFFD")
        if self.empty:
            said.append(f"left out {counted(self.empty, 'empty document')}")
        if self.bad:
            said.append(f"skipped {counted(self.bad, 'broken line')}; the first: {self.first_bad}")
        return said

    def why_nothing(self) -> str:
        """Of a pass that found no text."""
        if not self.bad:
            return "every document of it is empty"
        others = "the others are empty" if self.empty else "there are no others"
        return f"{self.bad:,} lines are broken, and {others}; the first: {self.first_bad}"


class Files:
    """A corpus of files and folders; folders are walked in the order of names."""

    def __init__(self, paths: Sequence[Path], *, skip_bad: bool = False, without: Path | None = None) -> None:
        """`without` is a folder to leave out: the output's, which may lie among the text.

        Raises DataError for a path that is not there, or when there is nothing to read.
        """
        self._files = [file for path in paths for file in files_of(Path(path), _is_text, without)]
        self._skip_bad = skip_bad
        self.tally = Tally()
        """Of the latest pass."""
        if not self._files:
            raise DataError(f"there is no text in {', '.join(map(str, paths)) or 'an empty list of paths'}")

    def __call__(self) -> Iterator[Piece]:
        """Raises DataError for what cannot be read, with file, line and reason."""
        self.tally = Tally()
        for file in self._files:
            try:
                with _open(file) as f:
                    yield from self._json_lines(file, f) if _is_jsonl(file) else self._text(file, f)
            except (OSError, EOFError, zlib.error) as e:
                raise DataError(f"{file} cannot be read: {e}") from None

    def _text(self, file: Path, f: BinaryIO) -> Iterator[Piece]:
        left, cut_off, several = "", b"", False
        for i, block in enumerate(iter(lambda: f.read(PIECE), b"")):
            block = without_mark(file, block) if i == 0 else block
            whole, cut_off = _whole_characters(cut_off + block)
            *pieces, left = _pieces(left + self._decode(whole))
            yield from (Piece(piece, False) for piece in pieces)
            several = several or bool(pieces)
        left += self._decode(cut_off)
        if several or self._has_text(left):
            yield Piece(left, True)

    def _json_lines(self, file: Path, f: BinaryIO) -> Iterator[Piece]:
        for number, line in enumerate(f, start=1):
            line = without_mark(file, line) if number == 1 else line
            text = self._json_text(f"{file} line {number}", self._decode(line.strip())) if line.strip() else None
            if text is not None and self._has_text(text):
                *pieces, last = _pieces(text)
                yield from (Piece(piece, False) for piece in pieces)
                yield Piece(last, True)

    def _has_text(self, text: str) -> bool:
        blank = not text or text.isspace()
        self.tally.empty += blank
        return not blank

    def _json_text(self, where: str, line: str) -> str | None:
        """The "text" of a line; None where it is broken and that is to be passed over."""
        try:
            value = json.loads(line)
            reason = None if isinstance(value, dict) else f"it is {type(value).__name__}, not an object"
        except (ValueError, RecursionError) as e:
            value, reason = None, f"it is not JSON: {e}"
        if reason is None and not isinstance(value.get("text"), str):
            reason = 'its "text" is no string' if "text" in value else 'it has no "text"'
        if reason is None:
            text, halves = _SURROGATE.subn(_REPLACEMENT, value["text"])
            self.tally.replaced += halves
            return text
        if not self._skip_bad:
            raise DataError(f"{where}: {reason}; mend it, or leave such lines out with --skip-bad")
        self.tally.bad += 1
        self.tally.first_bad = self.tally.first_bad or f"{where}: {reason}"
        return None

    def _decode(self, content: bytes) -> str:
        text = content.decode("utf-8", "replace")
        self.tally.replaced += text.count(_REPLACEMENT) - content.count(_REPLACEMENT.encode())
        return text


@dataclass(frozen=True)
class Scan:
    """What one pass over a corpus found."""

    sha256: str
    """Of the documents in their order, whatever files they came in."""
    digests: array[int]
    """The first 8 bytes of each document's own sha256."""
    lengths: array[int]
    """Characters of each."""

    @property
    def characters(self) -> int:
        return sum(self.lengths)


def scan(corpus: Corpus) -> Scan:
    """Read it all once. Raises DataError when there is no text."""
    whole, one, length = hashlib.sha256(), hashlib.sha256(), 0
    digests, lengths = array("Q"), array("Q")
    for text, ends in corpus():
        one.update(text.encode())
        length += len(text)
        if ends:
            whole.update(one.digest())
            digests.append(int.from_bytes(one.digest()[:8]))
            lengths.append(length)
            one, length = hashlib.sha256(), 0
    if not lengths:
        tally = corpus.tally if isinstance(corpus, Files) else Tally()
        raise DataError(f"there is no text in the data; {tally.why_nothing()}")
    return Scan(whole.hexdigest(), digests, lengths)


# ---- files and pieces ----------------------------------------------------------------------------------------------


def files_of(path: Path, is_wanted: Callable[[Path], bool], without: Path | None = None) -> list[Path]:
    """A file itself; of a folder those that are wanted by their name, in the order of names, and none that is hidden.

    Those of `without` are left out, where it lies in the folder. Raises DataError for a path that is not there,
    UsageError for one that is `without`.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        problem = "is no file or folder, and text is read more than once" if path.exists() else "does not exist"
        raise DataError(f"data path {path} {problem}")
    shown = (f for f in sorted(_walk(path)) if not any(part.startswith(".") for part in f.relative_to(path).parts))
    found = [file for file in shown if is_wanted(file)]
    if missing := next((file for file in found if not file.exists()), None):
        raise DataError(f"{missing} is a link to what is not there; mend it, or take it away")
    left_out = None if without is None else without.resolve()
    if left_out == path.resolve():
        raise UsageError(f"{path} is the folder of the data, and of the output too; choose another output")
    if left_out is None or left_out in path.resolve().parents:  # what is named within it is meant
        return found
    return [file for file in found if left_out not in file.resolve().parents]


def _walk(folder: Path) -> Iterator[Path]:
    """All files of a folder, links followed, no folder twice. Raises DataError for one that cannot be read."""

    def refuse(e: OSError) -> None:
        raise DataError(f"{e.filename} cannot be read: {e.strerror}")

    seen = set[Path]()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = Path(here).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(here, name) for name in files)


def _is_text(file: Path) -> bool:
    """By its name: README.md and README.md.gz are."""
    return suffix_of(file) in TEXT_SUFFIXES


def _is_jsonl(file: Path) -> bool:
    return suffix_of(file) in JSON_LINES


def suffix_of(file: Path) -> str:
    """In lower case; that of chat.jsonl.gz is .jsonl."""
    return (file.with_suffix("") if is_gzip(file) else file).suffix.lower()


def is_gzip(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


def _open(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file)) if is_gzip(file) else file.open("rb")


def without_mark(file: Path, beginning: bytes) -> bytes:
    """Without the byte order mark that some editors put before UTF-8."""
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file} is UTF-16; convert it to UTF-8")
    return beginning.removeprefix(b"\xef\xbb\xbf")


def _whole_characters(content: bytes) -> tuple[bytes, bytes]:
    """Split off the first bytes of a character whose last ones may still come."""
    for back in range(1, min(4, len(content) + 1)):
        byte = content[-back]
        if byte >= 0xC0:  # it begins a character of 2, 3 or 4 bytes
            needed = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return (content[:-back], content[-back:]) if needed > back else (content, b"")
        if byte < 0x80:
            break
    return content, b""


def _pieces(text: str) -> Iterator[str]:
    """Cut in gaps between words, where there are any; the last one is what is left."""
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        gaps = [gap.start() for gap in _BETWEEN_WORDS.finditer(text, max(start + 1, end - _SEARCHED), end)]
        end = gaps[-1] if gaps else end
        yield text[start:end]
        start = end
    yield text[start:]
