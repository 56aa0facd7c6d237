"""What is on disk of a conversation when something goes wrong, or two windows go on with it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from test_plain import FAKES, Terminal, needs_pty, piped
from tui_fakes import FakeChat, FakeModel, Turn

from gptedge.errors import ContextOverflowError
from gptedge.tui import store, unfinished
from gptedge.tui.common import UNANSWERED
from gptedge.tui.plain import Repl
from gptedge.tui.transcript import Note

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
MORE = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]


def said(folder: Path) -> list[list[str]]:
    """The words of each conversation in `folder`."""
    return sorted([m["content"] for m in store.read(path).messages] for path in folder.glob("*.json"))


async def test_a_question_that_is_refused_leaves_no_file(drive: Any, tmp_path: Path) -> None:
    too_long = Turn([], error=ContextOverflowError("the prompt has 9 tokens"), when="ask")
    async with drive(FakeModel([too_long, Turn(["fine"]), too_long]), system="Be brief.") as d:
        await d.ready()
        await d.send("too much")
        assert not d.app.file.exists
        assert said(tmp_path / "chats") == []
        d.app.composer.clear()
        await d.send("q")
        await d.send("too much")
    assert said(tmp_path / "chats") == [["Be brief.", "q", "fine"]]


async def test_a_first_question_that_is_stopped_at_once_leaves_no_file(drive: Any, tmp_path: Path) -> None:
    async with drive(FakeModel([Turn(["late"], gate=threading.Event())]), system="Be brief.") as d:
        await d.ready()
        await d.send("a question", wait=False)
        await d.until(lambda: said(tmp_path / "chats") == [["Be brief.", "a question"]])
        await d.pilot.press("escape")
        await d.idle()
        assert said(tmp_path / "chats") == []
    assert said(tmp_path / "chats") == []


def test_a_file_goes_only_where_it_is_this_chats_own(tmp_path: Path) -> None:
    theirs = store.ChatFile.new(tmp_path, "bundle")
    theirs.save(TALK)
    resumed = store.ChatFile(theirs.path, "bundle", TALK)
    resumed.save([])
    assert said(tmp_path) == [["a", "b"]]
    resumed.save([*TALK, *MORE])
    theirs.save([])  # another window has gone on with it
    assert said(tmp_path) == [["a", "b", "c", "d"]]


def test_two_windows_on_one_conversation_lose_nothing(tmp_path: Path) -> None:
    first = store.ChatFile.new(tmp_path, "bundle")
    first.save(TALK)
    second = store.ChatFile(first.path, "bundle", [{"role": "system", "content": "anew"}, *TALK])  # as --system does
    assert second.save([*TALK, *MORE]) is None
    assert second.news() is None
    assert first.save([*TALK, {"role": "user", "content": "mine"}]) is None
    assert first.news() == store.MOVED
    assert first.news() is None
    assert first.path != second.path
    first.save([*TALK, {"role": "user", "content": "mine"}, {"role": "assistant", "content": "too"}])
    second.save([*TALK, *MORE, *TALK])
    assert (first.news(), second.news()) == (None, None)
    assert said(tmp_path) == [["a", "b", "c", "d", "a", "b"], ["a", "b", "mine", "too"]]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff"])
def test_what_is_no_conversation_is_not_overwritten(tmp_path: Path, content: bytes) -> None:
    file = store.ChatFile.new(tmp_path, "bundle")
    file.save(TALK)
    before = file.path
    before.write_bytes(content)
    assert file.save([*TALK, *MORE]) is None
    assert before.read_bytes() == content
    assert store.read(file.path).messages == [*TALK, *MORE]


async def test_the_app_says_that_it_goes_on_in_a_new_file(drive: Any, tmp_path: Path) -> None:
    async with drive(FakeModel([Turn(["b"]), Turn(["two"])])) as d:
        await d.ready()
        await d.send("a")
        store.ChatFile(d.app.file.path, "fake", TALK).save([*TALK, *MORE])
        await d.send("mine")
        await d.send("and more")
        assert [n.text for n in d.app.transcript.query(Note)].count(store.MOVED) == 1
    assert said(tmp_path / "chats") == [["a", "b", "c", "d"], ["a", "b", "mine", "two", "and more", "two"]]


def test_plain_says_that_it_goes_on_in_a_new_file(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    file = store.ChatFile.new(tmp_path, "fake")
    file.save(TALK)
    store.ChatFile(file.path, "fake", TALK).save([*TALK, *MORE])
    piped(monkeypatch, FakeModel([Turn(["two"])]), b"mine\nand more\n", file=file)
    assert capsys.readouterr() == ("two\ntwo\n", f"gptedge: {store.MOVED}\n")
    assert said(tmp_path) == [["a", "b", "c", "d"], ["mine", "two", "and more", "two"]]


def test_plain_saves_the_question_and_then_what_has_come(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(unfinished, "SAVE_SECONDS", 0.0)
    written: list[list[str]] = []
    save = store.ChatFile.save

    def seen(self: store.ChatFile, messages: Any) -> str | None:
        written.append([m["content"] for m in messages])
        return save(self, messages)

    monkeypatch.setattr(store.ChatFile, "save", seen)
    model = FakeModel([Turn(["one ", "two"]), Turn(["anew"])])
    piped(monkeypatch, model, b"q\n/regenerate\n", file=store.ChatFile.new(tmp_path, "fake"))
    assert written[:3] == [["q"], ["q", "one "], ["q", "one two"]]
    assert ["q"] not in written[3:], "an answer made anew leaves the old one there until it is whole"
    assert said(tmp_path) == [["q", "anew"]]


@needs_pty
def test_plain_killed_in_a_reply_keeps_question_and_reply(tmp_path: Path) -> None:
    with Terminal(str(FAKES), "plain", str(tmp_path)) as t:
        t.until("> ")
        t.send("count\n")
        t.until("word3 ")
        assert said(tmp_path) == [["count"]]
        t.until("word150 ")  # 3 s
        t.process.kill()
        t.process.wait()
    question, reply = said(tmp_path)[0]
    assert question == "count"
    assert reply.startswith("word0 word1 ")
    assert os.listdir(tmp_path) == [store.latest(tmp_path).path.name]


@pytest.mark.parametrize("how", ["quit", "kill"])
async def test_leaving_before_an_answer_keeps_the_question(drive: Any, tmp_path: Path, how: str) -> None:
    late = Turn(["late"], gate=threading.Event())
    async with drive(FakeModel([Turn(["first"]), late])) as d:
        await d.ready()
        await d.send("Q1")
        await d.send("a long second question", wait=False)
        await d.until(lambda: said(tmp_path / "chats") == [["Q1", "first", "a long second question"]])
        await d.pilot.press("ctrl+q") if how == "quit" else d.app._killed()
    assert said(tmp_path / "chats") == [["Q1", "first", "a long second question"]]


async def test_a_question_sent_while_loading_is_kept(drive: Any, tmp_path: Path) -> None:
    gate, model = threading.Event(), FakeModel([Turn(["x"])])
    async with drive(model, load=lambda: (gate.wait(8), model)[1], system="Be brief.") as d:
        await d.send("a long question", wait=False)
        await d.until(lambda: d.app._asked is not None)
        await d.pilot.press("ctrl+q")
        gate.set()
    assert said(tmp_path / "chats") == [["Be brief.", "a long question"]]


async def test_a_question_without_an_answer_is_named(drive: Any, tmp_path: Path) -> None:
    file = store.ChatFile.new(tmp_path, "fake")
    file.save([*TALK, MORE[0]])
    saved = [*TALK, MORE[0]]
    file = store.ChatFile(file.path, "fake", saved)
    async with drive(FakeModel([Turn(["d"])]), resumed=saved, file=file) as d:
        await d.ready()
        assert UNANSWERED in [note.text for note in d.app.transcript.query(Note)]
        await d.pilot.press("ctrl+r")
        await d.until(lambda: d.app.chat.messages == [*TALK, *MORE])


def test_line_by_line_an_interrupt_before_an_answer_keeps_the_question(tmp_path: Path) -> None:
    model: Any = FakeModel([Turn(["never"])])
    repl = Repl(model, model.chat(), store.ChatFile.new(tmp_path, "fake"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeChat, "_chunks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            repl._answer("a question")
    repl._save()
    assert said(tmp_path) == [["a question"]]


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt
    yield
