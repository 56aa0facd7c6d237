"""Tokenizing a corpus into flat files, holding some of it out, and finding both again in the cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gptedge.errors import CheckpointError, DataError
from gptedge.tokenizer import Tokenizer, train_bpe
from gptedge.train import prepare
from gptedge.train.corpus import Corpus, Piece, scan
from gptedge.train.data import TokenData, held_out, require_length, write_tokens
from gptedge.train.stdlib import stdlib_corpus

DOCUMENTS = [f"document {i} says {'word ' * (i + 5)}" for i in range(60)]


def corpus_of(documents: list[str]) -> Corpus:
    """Each document in two pieces."""

    def corpus() -> Iterator[Piece]:
        for text in documents:
            yield from (Piece(text[:8], False), Piece(text[8:], True))

    return corpus


def written(folder: Path, documents: list[str], tokenizer: Tokenizer, *, fraction: float = 0.05) -> TokenData:
    corpus = corpus_of(documents)
    write_tokens(folder, corpus, scan(corpus), tokenizer, end=0, validation_fraction=fraction)
    return TokenData.load(folder)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(DOCUMENTS, 290, special_tokens=["<|endoftext|>"])


def test_held_out_documents_are_a_twentieth_and_follow_their_contents() -> None:
    chosen = {DOCUMENTS[i] for i in np.flatnonzero(held_out(scan(corpus_of(DOCUMENTS)), 0.05))}
    assert 0.025 <= sum(map(len, chosen)) / sum(map(len, DOCUMENTS)) <= 0.05
    backwards = DOCUMENTS[::-1]
    assert {backwards[i] for i in np.flatnonzero(held_out(scan(corpus_of(backwards)), 0.05))} == chosen
    assert not held_out(scan(corpus_of(DOCUMENTS)), 0.0).any()


def test_tokens_are_all_the_documents_each_ended(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = written(tmp_path, DOCUMENTS, tokenizer)
    chosen = held_out(scan(corpus_of(DOCUMENTS)), 0.05)
    for tokens, wanted in ((data.train, False), (data.validation, True)):
        assert tokens.dtype == np.uint16
        assert isinstance(tokens, np.memmap)
        pieces = np.split(tokens, np.flatnonzero(tokens == 0) + 1)
        assert pieces.pop().size == 0
        decoded = [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]
        assert decoded == [text for text, out in zip(DOCUMENTS, chosen, strict=True) if out == wanted]


def test_the_end_of_text_token_is_not_read_out_of_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = written(tmp_path, ["the <|endoftext|> b"], tokenizer, fraction=0.0)
    assert (data.train == 0).sum() == 1
    assert data.train[-1] == 0
    assert len(data.validation) == 0


def test_one_document_gives_its_last_tokens_to_validation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "one long document " * 200
    data = written(tmp_path, [text], tokenizer)
    assert len(data.validation) == pytest.approx(0.05 * (len(data.train) + len(data.validation)), abs=1)
    assert tokenizer.decode([*data.train.tolist(), *data.validation[:-1].tolist()]) == text


@pytest.mark.parametrize("later", [DOCUMENTS[:-1], [*DOCUMENTS, "more"], [*DOCUMENTS[:-1], "other"]])
def test_a_text_that_changes_while_it_is_read_is_noticed(
    later: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="changed while it was read"):
        write_tokens(tmp_path, corpus_of(later), scan(corpus_of(DOCUMENTS)), tokenizer, end=0, validation_fraction=0.05)


@pytest.mark.parametrize(
    ("name", "content"), [("train.bin", b"cut"), ("tokens.json", b"{}"), ("tokens.json", b""), ("train.bin", None)]
)
def test_damaged_tokens_are_refused(name: str, content: bytes | None, tokenizer: Tokenizer, tmp_path: Path) -> None:
    written(tmp_path, DOCUMENTS, tokenizer)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        TokenData.load(tmp_path)


def test_text_shorter_than_a_window_is_refused() -> None:
    require_length(np.arange(9, dtype=np.uint16), 8)
    with pytest.raises(DataError, match=r"has 8 tokens, and a window needs 9"):
        require_length(np.arange(8, dtype=np.uint16), 8)


# ---- the cache -----------------------------------------------------------------------------------------------------


def prepared(documents: list[str], messages: list[str], *, vocab_size: int = 290) -> tuple[Path, TokenData]:
    corpus, say = corpus_of(documents), messages.append
    scanned = prepare.scan_text(corpus, say)
    tokenizer = prepare.learn_tokenizer(corpus, scanned, vocab_size, say)
    return prepare.tokenize(corpus, scanned, tokenizer, validation_fraction=0.05, on_message=say)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTEDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_same_text_is_learned_from_and_tokenized_once(cache: Path) -> None:
    first: list[str] = []
    folder, data = prepared(DOCUMENTS, first)
    tokens = np.array(data.train)
    assert folder.parent == cache / "tokens"
    assert all("learned in" in line or "tokenized in" in line for line in first[1:])
    again: list[str] = []
    assert prepared(DOCUMENTS, again)[0] == folder
    assert again[0] == first[0]
    assert all("before" in line for line in again[1:])
    assert prepared(DOCUMENTS[::-1], [])[0] != folder
    assert prepared(DOCUMENTS, [], vocab_size=260)[0] != folder
    (folder / "train.bin").write_bytes(b"torn")
    mended = prepared(DOCUMENTS, again)[1]
    assert "tokenized in" in again[-1]
    assert np.array_equal(mended.train, tokens)


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"tokenizers.* cannot be written: .*; make room, or set GPTEDGE_CACHE"):
        prepared(DOCUMENTS, [])


def test_a_vocabulary_of_a_large_text_comes_from_all_over_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "VOCABULARY_CHARACTERS", 4000)
    documents, messages = ["aa " * 1000, "bb " * 1000], list[str]()
    prepared(documents, messages)
    assert "learned from 67% of the text" in messages[1]
    corpus = corpus_of(documents)
    tokenizer = prepare.learn_tokenizer(corpus, scan(corpus), 290, messages.append)
    assert tokenizer.token_to_id("bb") is not None


def test_stdlib_corpus_is_large_and_the_same_in_another_process() -> None:
    documents = list(stdlib_corpus())
    assert sum(map(len, documents)) > 1_000_000
    assert any("asyncio" in text for text in documents)
    code = (
        "import hashlib, sys; from gptedge.train.stdlib import stdlib_corpus\n"
        "print(hashlib.sha256(''.join(stdlib_corpus()).encode()).hexdigest(), 'antigravity' in sys.modules)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.split() == [hashlib.sha256("".join(documents).encode()).hexdigest(), "False"]
