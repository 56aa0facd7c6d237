"""Tokens on disk: flat arrays of a corpus, memory-mapped, so that training needs no memory of the corpus's size.

FOLDER/tokens.json    their type and how many
FOLDER/train.bin      tokens in a row, an end-of-text token after each document
FOLDER/validation.bin those held out: whole documents, or the end of the text where no documents can be chosen
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gptedge.checkpoint import read_json_object
from gptedge.errors import CheckpointError, DataError
from gptedge.files import write_json
from gptedge.tokenizer import Tokenizer
from gptedge.train.corpus import Corpus, Scan

TokenArray = npt.NDArray[np.unsignedinteger[Any]]
"""uint16, or uint32 where the vocabulary needs it."""

TOKENS, TRAIN, VALIDATION = "tokens.json", "train.bin", "validation.bin"
_CHANGED = "the text changed while it was read; start again"
_TYPES = {"uint16": np.uint16, "uint32": np.uint32}


@dataclass(frozen=True)
class TokenData:
    """Documents that each end in an end-of-text token."""

    train: TokenArray
    validation: TokenArray

    @classmethod
    def load(cls, folder: Path) -> TokenData:
        """Memory-mapped, as `write_tokens` left them. Raises CheckpointError."""
        about = read_json_object(folder / TOKENS)
        try:
            dtype = np.dtype(_TYPES[about["dtype"]]).newbyteorder("<")
            train, validation = (_map(folder / n, dtype, int(about[n])) for n in (TRAIN, VALIDATION))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"the tokens in {folder} cannot be read: {e}; remove that folder") from None
        held_out = int(about.get("train_tail", 0))
        if held_out:
            train, validation = train[:-held_out], train[-held_out:]
        return cls(train, validation)


def _map(path: Path, dtype: np.dtype[Any], count: int) -> TokenArray:
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise ValueError(f"{path.name} has {size} bytes, and {count} tokens were written")
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)


def write_tokens(
    folder: Path,
    corpus: Corpus,
    scanned: Scan,
    tokenizer: Tokenizer,
    *,
    end: int,
    validation_fraction: float,
    on_progress: Callable[[int], None] = lambda characters: None,
) -> None:
    """Encode each document into `folder`, its text taken literally, and part them into training and validation.

    `end` follows each document. `on_progress` hears how many characters are done. Raises DataError when the corpus is
    no longer the one that was scanned.
    """
    chosen = held_out(scanned, validation_fraction)
    name = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    dtype = np.dtype(_TYPES[name]).newbyteorder("<")
    counts, document, done = [0, 0], 0, 0
    with (folder / TRAIN).open("wb") as train, (folder / VALIDATION).open("wb") as validation:
        files: tuple[BinaryIO, BinaryIO] = (train, validation)
        for text, ends in corpus():
            if document == len(chosen):
                raise DataError(_CHANGED)
            ids = tokenizer.encode(text, parse_special=False)
            side = int(chosen[document])
            files[side].write(np.array([*ids, end] if ends else ids, dtype).tobytes())
            counts[side] += len(ids) + ends
            document += ends
            done += len(text)
            on_progress(done)
    if (document, done) != (len(chosen), scanned.characters):
        raise DataError(_CHANGED)
    tail = 0 if chosen.any() else int(counts[0] * validation_fraction)
    write_json(folder / TOKENS, {"dtype": name, TRAIN: counts[0], VALIDATION: counts[1], "train_tail": tail})


def held_out(scanned: Scan, fraction: float) -> npt.NDArray[np.bool_]:
    """Which documents to hold out: whole ones that make up at most `fraction` of the text, chosen by their digests.

    None when documents are too few or too large to choose at least half of that from.
    """
    lengths, digests = np.asarray(scanned.lengths, np.uint64), np.asarray(scanned.digests, np.uint64)
    room = int(lengths.sum()) * fraction
    order = np.argsort(digests, kind="stable")
    order = order[lengths[order] <= room]
    order = order[np.cumsum(lengths[order]) <= room]
    chosen = np.zeros(len(lengths), np.bool_)
    chosen[order] = int(lengths[order].sum()) >= room / 2 > 0
    return chosen


def require_length(tokens: TokenArray, context: int) -> None:
    """Raises DataError when not one window can be drawn."""
    if len(tokens) <= context:
        raise DataError(f"the training text has {len(tokens)} tokens, and a window needs {context + 1}; give more text")
