"""Text for training: read from files and tokenized once into flat arrays.

A document is one file; an end-of-text token follows each. About a twentieth of the text is held out for validation.
Everything is held in memory as text once, while it is tokenized. Chats and other structured data are not read here.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptedge.errors import CheckpointError, DataError
from gptedge.files import new_file
from gptedge.tokenizer import Tokenizer

TokenArray = npt.NDArray[np.unsignedinteger[Any]]
"""uint16, or uint32 where the vocabulary needs it."""

_SUFFIXES = ".txt .text .md .markdown .rst .tex .html .py .js .ts .java .c .h .cpp .go .rs .rb .sh"
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
"""What is read of a folder, each also with .gz behind it. A file that is named itself is read whatever it is called."""

_SAMPLE_CHARACTERS = 4_000_000  # enough to learn a vocabulary from


# ---- reading -------------------------------------------------------------------------------------------------------


def read_documents(paths: Sequence[Path]) -> list[str]:
    """The text of every file, folders walked in the order of names. Raises DataError when there is none."""
    texts = [_read_text(file) for path in paths for file in _files(Path(path))]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"there is no text in {', '.join(map(str, paths)) or 'an empty list of paths'}")
    return texts


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"data path {path} does not exist")
    return [file for file in sorted(path.rglob("*")) if file.is_file() and _is_text(file.relative_to(path))]


def _is_text(file: Path) -> bool:
    """By its name: README.md and README.md.gz are, and nothing in a hidden folder is."""
    plain = file.with_suffix("") if file.suffix == ".gz" else file
    return plain.suffix.lower() in TEXT_SUFFIXES and not any(part.startswith(".") for part in file.parts)


def _read_text(file: Path) -> str:
    try:
        content = file.read_bytes()
        return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{file} is not UTF-8: byte {e.object[e.start]:#04x} at offset {e.start}; convert it") from None
    except (OSError, EOFError) as e:
        raise DataError(f"{file} cannot be read: {e}") from None


def fingerprint(documents: Iterable[str]) -> str:
    """The same documents in the same order give the same digest."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


# ---- splitting and sampling ----------------------------------------------------------------------------------------


def vocabulary_sample(documents: Sequence[str]) -> list[str]:
    """Documents to learn a vocabulary from: all of them, or pieces spread evenly over them."""
    total = sum(map(len, documents))
    if total <= _SAMPLE_CHARACTERS:
        return list(documents)
    return [text[: max(1, len(text) * _SAMPLE_CHARACTERS // total)] for text in documents]


def held_out(documents: Sequence[str], fraction: float) -> frozenset[int]:
    """Indices of whole documents that make up at most `fraction` of the text, chosen by their contents' digests.

    Empty when documents are too few or too large to choose from.
    """
    room = int(sum(map(len, documents)) * fraction)
    enough, chosen = room // 2, set()
    for i in sorted(range(len(documents)), key=lambda i: hashlib.sha256(documents[i].encode()).digest()):
        if len(documents[i]) <= room:
            room -= len(documents[i])
            chosen.add(i)
    return frozenset(chosen) if room <= enough else frozenset()


# ---- tokens --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenData:
    """Tokenized text, as flat arrays of documents that each end in an end-of-text token."""

    train: TokenArray
    validation: TokenArray

    def save(self, folder: Path) -> None:
        for name in ("train", "validation"):
            with new_file(folder / f"{name}.npy") as path, path.open("wb") as f:
                np.save(f, getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> TokenData:
        """Memory-mapped, as it was saved. Raises CheckpointError."""
        try:
            train, validation = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("train", "validation"))
        except (OSError, ValueError) as e:
            raise CheckpointError(f"the run's tokens in {folder} cannot be read: {e}") from None
        return cls(train, validation)


def tokenize(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    *,
    end: int,
    validation_fraction: float,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenData:
    """Encode each document, its text taken literally, and part them into training and validation.

    Where no whole documents can be held out, the last tokens of the text are.
    """
    chosen = held_out(documents, validation_fraction)
    dtype: type[np.unsignedinteger[Any]] = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    parts: tuple[list[TokenArray], list[TokenArray]] = ([], [])
    for i, text in enumerate(documents):
        ids = tokenizer.encode(text, parse_special=False)
        parts[i in chosen].append(np.array([*ids, end], dtype))
        if on_progress is not None:
            on_progress(i + 1, len(documents))
    train, validation = (np.concatenate(part) if part else np.empty(0, dtype) for part in parts)
    if not chosen:
        cut = len(train) - int(len(train) * validation_fraction)
        train, validation = train[:cut], train[cut:]
    return TokenData(train, validation)


def require_length(tokens: TokenArray, context: int) -> None:
    """Raises DataError when not one window can be drawn."""
    if len(tokens) <= context:
        raise DataError(f"the training text has {len(tokens)} tokens, and a window needs {context + 1}; give more text")
