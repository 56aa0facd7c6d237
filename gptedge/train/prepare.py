"""From text to a tokenizer and tokens, each made once: kept in the user's cache by what they were made from.

    CACHE/tokenizers/KEY.json    KEY: the text's digest, the vocabulary's size
    CACHE/tokens/KEY/            KEY: the text's digest, the tokenizer's, the fraction held out

CACHE is $GPTEDGE_CACHE, or the system's place for what can be made again. Anything in it may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gptedge.errors import CheckpointError, DataError, GptEdgeError
from gptedge.files import cache_folder, new_file, new_folder, writing
from gptedge.text import counted
from gptedge.tokenizer import Tokenizer, train_bpe
from gptedge.train.corpus import Corpus, Files, Scan, scan
from gptedge.train.data import TokenData, write_tokens

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_CHARACTERS = 100_000_000
"""Of a longer text, a vocabulary is learned from pieces spread evenly over it."""

_FORMAT = 1  # counts up when the same text would give other tokens
_EVERY_S = 10.0
_ADVICE = "make room, or set GPTEDGE_CACHE elsewhere"

OnMessage = Callable[[str], None]


def scan_text(corpus: Corpus, on_message: OnMessage) -> Scan:
    """One pass over the text, and what was found in it."""
    found = scan(corpus)
    on_message(f"text: {counted(len(found.lengths), 'document')}, {found.characters:,} characters")
    if isinstance(corpus, Files):
        for line in corpus.tally.lines():
            on_message(f"text: {line}")
    return found


def learn_tokenizer(corpus: Corpus, scanned: Scan, vocab_size: int, on_message: OnMessage) -> Tokenizer:
    """Learned from the text, or found in the cache."""
    path = cache_folder("tokenizers") / f"{_key(scanned.sha256, vocab_size)}.json"
    try:
        tokenizer = Tokenizer.from_file(path)
        on_message(f"tokenizer: {tokenizer.vocab_size:,} tokens, learned before")
        return tokenizer
    except (GptEdgeError, OSError):  # missing, or not what was written there: it is made anew
        pass
    began = time.perf_counter()
    share = min(1.0, VOCABULARY_CHARACTERS / scanned.characters)
    tokenizer = train_bpe(_sample(corpus, share), vocab_size, special_tokens=[END_OF_TEXT])
    with writing(path, DataError, _ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as work:
            tokenizer.save(work)
    part = "" if share == 1 else f" from {share:.0%} of the text"
    on_message(f"tokenizer: {tokenizer.vocab_size:,} tokens, learned{part} in {time.perf_counter() - began:.1f} s")
    return tokenizer


def tokenize(
    corpus: Corpus, scanned: Scan, tokenizer: Tokenizer, *, validation_fraction: float, on_message: OnMessage
) -> tuple[Path, TokenData]:
    """The text's tokens, made now or found in the cache, and the folder they are in."""
    made_by = hashlib.sha256(json.dumps(tokenizer.to_dict()).encode()).hexdigest()
    folder = cache_folder("tokens") / _key(scanned.sha256, made_by, validation_fraction)
    began, how = time.perf_counter(), "tokenized before"
    try:
        data = TokenData.load(folder)
    except CheckpointError:
        with writing(folder, DataError, _ADVICE), new_folder(folder, force=True) as work:
            write_tokens(
                work,
                corpus,
                scanned,
                tokenizer,
                end=end_of_text(tokenizer),
                validation_fraction=validation_fraction,
                on_progress=_progress(scanned.characters, on_message),
            )
        data, how = TokenData.load(folder), f"tokenized in {time.perf_counter() - began:.1f} s"
    on_message(f"tokens: {len(data.train):,} to train on, {len(data.validation):,} held out; {how}")
    return folder, data


def end_of_text(tokenizer: Tokenizer) -> int:
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None, "train_bpe was asked for it"
    return end


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:32]


def _sample(corpus: Corpus, share: float) -> Iterator[str]:
    """Every piece, or of each its share from its beginning; a piece that would be shorter than a word is left out."""
    for text, _ends in corpus():
        yield text if share == 1 else text[: int(len(text) * share)]


def _progress(total: int, on_message: OnMessage) -> Callable[[int], None]:
    """A line now and then."""
    shown = time.monotonic()

    def on_progress(done: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= _EVERY_S:
            shown = time.monotonic()
            on_message(f"tokenizing: {done:,} of {total:,} characters")

    return on_progress
