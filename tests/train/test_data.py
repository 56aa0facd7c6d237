"""Reading text, splitting it, and tokenizing it."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptedge.errors import CheckpointError, DataError
from gptedge.tokenizer import train_bpe
from gptedge.train.data import (
    TokenData,
    held_out,
    read_documents,
    require_length,
    tokenize,
    vocabulary_sample,
)
from gptedge.train.stdlib import stdlib_corpus

DOCUMENTS = [f"document {i} says {'word ' * (i + 5)}" for i in range(60)]


def test_folders_are_read_in_order_and_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "z.md").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"second"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git" / "notes.txt").write_text("hidden")
    odd = tmp_path / "LICENSE"
    odd.write_text("named itself")
    assert read_documents([tmp_path, odd]) == ["first", "second", "third", "named itself"]


def test_text_that_is_not_utf8_is_named_with_its_offset(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 3"):
        read_documents([tmp_path])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("empty.txt", b"", "no text"), ("cut.txt.gz", gzip.compress(b"x" * 99)[:20], "cannot be read")],
)
def test_unusable_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents([tmp_path])


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        read_documents([tmp_path / "nowhere"])


def test_held_out_documents_are_a_twentieth_and_follow_their_contents() -> None:
    chosen = held_out(DOCUMENTS, 0.05)
    share = sum(len(DOCUMENTS[i]) for i in chosen) / sum(map(len, DOCUMENTS))
    assert 0.025 <= share <= 0.05
    backwards = held_out(DOCUMENTS[::-1], 0.05)
    assert {DOCUMENTS[i] for i in chosen} == {DOCUMENTS[::-1][i] for i in backwards}


def test_tokens_are_all_the_documents_each_ended() -> None:
    tokenizer = train_bpe(DOCUMENTS, 290, special_tokens=["<|endoftext|>"])
    data = tokenize(DOCUMENTS, tokenizer, end=0, validation_fraction=0.05)
    assert data.train.dtype == np.uint16
    chosen = held_out(DOCUMENTS, 0.05)
    for tokens, wanted in ((data.train, False), (data.validation, True)):
        pieces = np.split(tokens, np.flatnonzero(tokens == 0) + 1)
        assert pieces.pop().size == 0
        decoded = [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]
        assert decoded == [text for i, text in enumerate(DOCUMENTS) if (i in chosen) == wanted]


def test_the_end_of_text_token_is_not_read_out_of_text() -> None:
    tokenizer = train_bpe(DOCUMENTS, 290, special_tokens=["<|endoftext|>"])
    data = tokenize(["a <|endoftext|> b"], tokenizer, end=0, validation_fraction=0.0)
    assert (data.train == 0).sum() == 1
    assert data.train[-1] == 0


def test_one_document_gives_its_last_tokens_to_validation() -> None:
    text = "one long document " * 200
    tokenizer = train_bpe([text], 270, special_tokens=["<|endoftext|>"])
    data = tokenize([text], tokenizer, end=0, validation_fraction=0.05)
    assert len(data.validation) == pytest.approx(0.05 * (len(data.train) + len(data.validation)), abs=1)
    assert tokenizer.decode([*data.train.tolist(), *data.validation[:-1].tolist()]) == text


def test_vocabulary_sample_takes_from_every_document() -> None:
    assert vocabulary_sample(DOCUMENTS) == DOCUMENTS
    large = ["a" * 6_000_000, "b" * 2_000_000]
    assert [(piece[0], len(piece)) for piece in vocabulary_sample(large)] == [("a", 3_000_000), ("b", 1_000_000)]


def test_text_shorter_than_a_window_is_refused() -> None:
    require_length(np.arange(9, dtype=np.uint16), 8)
    with pytest.raises(DataError, match=r"has 8 tokens, and a window needs 9"):
        require_length(np.arange(8, dtype=np.uint16), 8)


def test_tokens_come_back_from_disk(tmp_path: Path) -> None:
    data = TokenData(np.arange(9, dtype=np.uint16), np.arange(3, dtype=np.uint16))
    data.save(tmp_path)
    again = TokenData.load(tmp_path)
    assert np.array_equal(again.train, data.train)
    assert np.array_equal(again.validation, data.validation)
    (tmp_path / "train.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TokenData.load(tmp_path)


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
