"""Reading text as people have it: in pieces, mended and counted, never held whole."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gptedge.train.corpus as corpus_module
from gptedge.errors import DataError, UsageError
from gptedge.tokenizer import Tokenizer, train_bpe
from gptedge.train.corpus import Files, Piece, files_of, scan


def documents(files: Files) -> list[str]:
    whole, parts = [], []
    for text, ends in files():
        parts.append(text)
        if ends:
            whole.append("".join(parts))
            parts = []
    assert parts == []
    return whole


def test_folders_are_read_in_order_and_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "z.md").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"second"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "c.jsonl").write_text('{"text": "fourth"}\n\n{"text": "", "id": 7}\n{"text": "fifth"}')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "sixth"}\n'))
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git" / "notes.txt").write_text("hidden")
    odd = tmp_path / "LICENSE"
    odd.write_text("named itself")
    files = Files([tmp_path, odd])
    assert documents(files) == ["first", "second", "third", "fourth", "fifth", "sixth", "named itself"]
    assert files.tally.lines() == ["left out 2 empty documents"]


def test_the_outputs_folder_is_left_out_where_it_lies_among_the_text(tmp_path: Path) -> None:
    for name in ("a.txt", "out/b.txt", "out/c/d.txt", "out.b/e.txt", "z/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    out = tmp_path / "z" / ".." / "out"
    assert documents(Files([tmp_path], without=out)) == ["a.txt", "out.b/e.txt", "z/f.txt"]
    assert documents(Files([out / "c", out / "b.txt", tmp_path / "z"], without=out)) == [
        "out/c/d.txt",
        "out/b.txt",
        "z/f.txt",
    ]
    with pytest.raises(UsageError, match="is the folder of the data, and of the output too; choose another output"):
        Files([tmp_path / "out"], without=out)


def test_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"caf\xe9 au lait, \xef\xbf\xbd was there, 4 of \xf0\x9f\x99 \xc3"
    (tmp_path / "latin.txt").write_bytes(content)
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d alone"}\n')
    for size in (1 << 20, 3):  # whatever the boundaries of what is read at a time
        monkeypatch.setattr(corpus_module, "PIECE", size)
        files = Files([tmp_path])
        assert documents(files) == ["\ufffd alone", content.decode("utf-8", "replace")]
        assert files.tally.replaced == 4
        assert files.tally.lines() == ["replaced 4 invalid UTF-8 sequences with U+FFFD"]


def test_valid_text_is_whole_whatever_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "naïve 中文 🙂 words and words " * 5
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    for size in range(4, 40):
        monkeypatch.setattr(corpus_module, "PIECE", size)
        files = Files([tmp_path / "a.txt"])
        assert documents(files) == [text]
        assert all(len(piece.text) <= size for piece in files())
        assert files.tally.lines() == []


def test_pieces_of_a_document_have_the_tokens_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The quick (brown) fox's 123 jumps,\n\n  over the lazy dog; naïve café 中文! " * 30
    tokenizer = train_bpe([text], 400)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    monkeypatch.setattr(corpus_module, "PIECE", 200)
    pieces = [piece.text for piece in Files([tmp_path])()]
    assert len(pieces) > 10
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "cut', "it is not JSON: Unterminated string"),
        ('["text"]', "it is list, not an object"),
        ('{"messages": []}', 'it has no "text"'),
        ('{"text": 7}', 'its "text" is no string'),
        ("[" * 100_000, "it is not JSON"),
    ],
)
def test_a_broken_line_is_named_or_left_out_and_counted(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "first"}}\n\n{line}\n{{"text": "last"}}\n{line}\n')
    with pytest.raises(DataError, match=rf"data\.jsonl line 3: {reason}.*; mend it, or .*--skip-bad"):
        documents(Files([path]))
    files = Files([path], skip_bad=True)
    for _ in range(2):  # counted anew in each pass
        assert documents(files) == ["first", "last"]
        assert files.tally.bad == 2
    (said,) = files.tally.lines()
    assert said.startswith("skipped 2 broken lines; the first: ")
    assert f"line 3: {reason}" in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.txt.gz", gzip.compress(b"x" * 99)[:20], "cannot be read"),
        ("no.txt.gz", b"plain", "cannot be read"),
        ("wide.txt", "hello".encode("utf-16"), "is UTF-16; convert it to UTF-8"),
        ("empty.txt", b"", "there is no text"),
        ("blank.jsonl", b'{"text": " "}\n', "there is no text"),
    ],
)
def test_unusable_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        scan(Files([tmp_path]))


@pytest.mark.parametrize(("more", "others"), [("", "there are no others"), ('{"text": ""}\n', "the others are empty")])
def test_lines_that_are_all_broken_are_counted(more: str, others: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n[]\n" + more)
    with pytest.raises(
        DataError, match=rf"no text in the data; 2 lines are broken, and {others}; the first: .* line 1: "
    ):
        scan(Files([tmp_path], skip_bad=True))


def test_paths_with_nothing_to_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        Files([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"there is no text in .*"):
        Files([tmp_path])


def test_a_scan_follows_the_documents_and_not_their_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "three"}\n')
    apart, together = scan(Files([tmp_path / "a.txt", tmp_path / "b.txt"])), scan(Files([tmp_path / "c.jsonl"]))
    assert apart == together
    assert (apart.lengths.tolist(), apart.characters) == ([3, 5], 8)
    assert scan(Files([tmp_path / "b.txt", tmp_path / "a.txt"])).sha256 != apart.sha256
    assert scan(lambda: iter([Piece("onethree", True)])).sha256 != apart.sha256
    assert scan(lambda: iter([Piece("o", False), Piece("ne", True), Piece("three", True)])) == apart


def test_one_enormous_line_needs_little_memory(tmp_path: Path) -> None:
    """200 MB without a newline, and then without a space: read and counted in the memory of a few pieces."""
    path = tmp_path / "line.txt"
    with path.open("wb") as f:
        for _ in range(100):
            f.write(b"word " * 200_000 + b"x" * 1_000_000)
    code = f"""
import resource, sys
from pathlib import Path
from gptedge.train.corpus import Files, scan
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(scan(Files([Path({str(path)!r})])).characters, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    characters, more_kb = map(int, done.stdout.split())
    assert characters == 200_000_000
    assert more_kb < 40_000


def test_words_without_end_train_a_vocabulary(tmp_path: Path) -> None:
    tokenizer = train_bpe(["x" * 300_000 + " y"], 270)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.token_to_id("x" * 1024) is not None


def test_links_are_followed_and_none_twice(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "data" / "sub" / "b.txt").write_text("b")
    (tmp_path / "other" / "c.txt").write_text("c")
    (tmp_path / "data" / "linked").symlink_to("../other")
    (tmp_path / "data" / "sub" / "back").symlink_to("..")
    (tmp_path / "data" / "zzz").symlink_to("sub")
    found = files_of(tmp_path / "data", lambda file: True)
    assert [str(f.relative_to(tmp_path / "data")) for f in found] == ["a.txt", "linked/c.txt", "sub/b.txt"]
    (tmp_path / "data" / "gone.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone\.txt is a link to what is not there"):
        files_of(tmp_path / "data", lambda file: True)


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By root too, whom no mode keeps out."""
    (tmp_path / "sub").mkdir()
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if Path(path).name == "sub":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"sub cannot be read: Permission denied"):
        files_of(tmp_path, lambda file: True)


def test_pipes_are_called_what_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is no file or folder, and text is read more than once"):
        files_of(tmp_path / "pipe", lambda file: True)


@pytest.mark.parametrize("name", ["x.jsonl.GZ", "x.NDJSON", "x.ndjson.gz", "x.JSONL"])
def test_suffixes_count_in_either_case(name: str, tmp_path: Path) -> None:
    line = b'{"text": "hello there"}\n'
    (tmp_path / name).write_bytes(gzip.compress(line) if name.lower().endswith(".gz") else line)
    for path in (tmp_path, tmp_path / name):
        assert "".join(piece.text for piece in Files([path])()) == "hello there"


def test_the_outputs_folder_is_left_out_behind_a_link_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "other" / "out").mkdir(parents=True)
    (tmp_path / "other" / "a.txt").write_text("a")
    (tmp_path / "other" / "out" / "b.txt").write_text("b")
    (tmp_path / "data" / "linked").symlink_to("../other")
    assert documents(Files([tmp_path / "data"], without=tmp_path / "other" / "out")) == ["a"]
