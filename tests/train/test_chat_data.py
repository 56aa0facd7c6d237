"""Conversations as people have them: every spelling that is read, and every flaw that is named by line and reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gptedge.errors import DataError
from gptedge.train.chat_data import ASSISTANT, SYSTEM, USER, Message, Record, read_records

ASK, TELL = Message(USER, "Who?"), Message(ASSISTANT, "Ann.")


def turns(*pairs: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more} for role, content in pairs]}


GOOD = turns((USER, "Who?"), (ASSISTANT, "Ann."))


def written(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "record"),
    [
        (GOOD, (ASK, TELL)),
        (turns((SYSTEM, ""), (USER, "Who?"), (ASSISTANT, "Ann.")), (Message(SYSTEM, ""), ASK, TELL)),
        (turns(("developer", "Be terse."), (USER, "Who?"), (ASSISTANT, "Ann."))
            , (Message(SYSTEM, "Be terse."), ASK, TELL)),
        ({"messages": [{"role": USER, "content": [{"type": "text", "text": "Who?"}]},
                       {"role": ASSISTANT, "content": "Ann."}]}, (ASK, TELL)),
        ({"messages": [*turns((USER, "Who?"))["messages"], {"role": ASSISTANT, "content": "Bo.", "weight": 0},
                       *GOOD["messages"]]}, (ASK, Message(ASSISTANT, "Bo.", learn=False), ASK, TELL)),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ann."}]}, (ASK, TELL)),
        ({"instruction": "Who?", "output": "Ann."}, (ASK, TELL)),
        ({"instruction": "Who?", "input": "", "output": "Ann."}, (ASK, TELL)),
        ({"instruction": "Translate.", "input": "Anne", "output": "Ann."}, (Message(USER, "Translate.\n\nAnne"), TELL)),
        ({"prompt": "Who?", "completion": "Ann."}, (ASK, TELL)),
        ({"question": "Who?", "answer": "Ann.", "id": 3}, (ASK, TELL)),
        ({"input": "Who?", "output": "Ann."}, (ASK, TELL)),
        ({"system": "Be terse.", "prompt": "Who?", "response": "Ann."}, (Message(SYSTEM, "Be terse."), ASK, TELL)),
        ({"text": "Once."}, "Once."),
    ],
)  # fmt: skip
def test_what_is_read(row: Any, record: Record, tmp_path: Path) -> None:
    assert read_records([written(tmp_path / "chat.jsonl", row)]).items == [record]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "a JSON object is needed, not int"),
        ({"a": 1}, "its keys are a; messages, a pair such as prompt and completion, or text is needed"),
        ({"messages": "Who?"}, "messages is str, not a list"),
        ({"messages": ["Who?"]}, "message 1 is not an object with role and content"),
        ({"messages": []}, "no reply to learn"),
        (turns((USER, "Who?")), "the last message is not the assistant's"),
        (
            turns((USER, "Who?"), (USER, "Who?"), (ASSISTANT, "A")),
            "message 2 is the user's where the assistant's",
        ),
        (turns((ASSISTANT, "A")), "message 1 is the assistant's where the user's turn is"),
        (turns((USER, "Who?"), (SYSTEM, "S"), (ASSISTANT, "A")), "message 2 is the system's"),
        (turns((USER, "Who?"), (ASSISTANT, " \n")), "message 2, the assistant's, is empty"),
        (turns((USER, ""), (ASSISTANT, "A")), "message 1, the user's, is empty"),
        (turns((USER, "Who?"), ("tool", "4"), (ASSISTANT, "A")), "message 2 has the role 'tool'"),
        ({"messages": [{"role": USER}, {"role": ASSISTANT, "content": "A"}]}, "message 1 is missing, not text"),
        ({"prompt": "Who?", "completion": 3}, "completion is int, not text"),
        ('{"text": "\\ud800"}', "text holds half of a surrogate pair"),
        ({"text": " "}, "text is empty"),
        (turns((USER, "Who?"), (ASSISTANT, "A"), weight=0), "every reply has the weight 0"),
    ],
)
def test_what_is_wrong_is_named_by_line_and_reason(row: Any, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(DataError) as caught:
        read_records([path])
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert reason in str(caught.value)
    assert str(caught.value).endswith("mend it, or leave such records out with --skip-bad")
    assert "\n" not in str(caught.value)
    kept = read_records([path], skip_bad=True)
    assert kept.items == [(ASK, TELL)] * 2
    assert len(kept.bad) == 1
    assert kept.notes()[0].startswith("left out chat.jsonl, line 3: ")


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    notes = read_records([written(tmp_path / "chat.jsonl", *["{"] * 9, GOOD)], skip_bad=True).notes()
    assert len(notes) == 4
    assert notes[-1] == "left out 6 more"


@pytest.mark.parametrize(("content", "why"), [("", "there are no records"), ("{\n{", "no record is good, the first: ")])
def test_nothing_to_learn_from(content: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"nothing to learn from in .*chat.jsonl: {why}"):
        read_records([written(tmp_path / "chat.jsonl", content)], skip_bad=True)


def test_files_of_every_kind(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(json.dumps(GOOD))
    written(tmp_path / "b.json", [{"text": "B\u2028B"}, {"text": "C"}])
    (tmp_path / "c.txt").write_bytes(b"plain\n")
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "D"}).encode() + b"\r\n")
    (tmp_path / "e.txt").touch()
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
    assert read_records([tmp_path]).items == [(ASK, TELL), "B\u2028B", "C", "plain\n", "D"]


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\x85"}\n', encoding="utf-8")
    assert read_records([tmp_path / "a.jsonl"]).items == ["one\u2028two\x85"]


def test_invalid_utf8_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9 \xef\xbf\xbd \xff\xfe"}\n')
    records = read_records([tmp_path / "a.jsonl"])
    assert records.items == ["caf\ufffd \ufffd \ufffd\ufffd"]
    assert records.notes() == ["read 3 invalid UTF-8 sequences as U+FFFD"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.txt", "words".encode("utf-16"), "a.txt is UTF-16; convert it to UTF-8"),
        ("a.jsonl", json.dumps(GOOD).encode("utf-16"), "a.jsonl is UTF-16; convert it to UTF-8"),
        ("model", b"\x93\0\0\0weights", "model holds NUL bytes, which no text does"),
        ("chat.csv", b"question,answer\nWhy?,Because.\n", "chat.csv is a table; make JSON lines of it"),
        ("chat", json.dumps(GOOD).encode(), r"chat looks like JSON; call it chat.jsonl"),
    ],
)
def test_what_is_no_text_is_not_learned_as_such(name: str, content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=why):
        read_records([tmp_path / name])


@pytest.mark.parametrize("content", [gzip.compress(b'{"text": "a"}' * 99)[:-9], b"no gzip"])
def test_a_torn_gzip_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read"):
        read_records([tmp_path / "a.jsonl.gz"])


def test_a_broken_array_advises_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"for one record a line, call it a\.jsonl"):
        read_records([written(tmp_path / "a.json", {"text": "a"}, {"text": "b"})])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_records([tmp_path / "none.jsonl"])


def test_hidden_files_and_capital_suffixes(tmp_path: Path) -> None:
    line = b'{"prompt": "a", "completion": "b"}\n'
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "copy.jsonl").write_bytes(line)
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(line))
    assert len(read_records([tmp_path]).items) == 1
