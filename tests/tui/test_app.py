"""The chat app, with a fake model, through Textual's pilot."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from tui_fakes import FakeModel, Turn

from gptedge.errors import BundleError, ContextOverflowError
from gptedge.tui import store
from gptedge.tui.app import CONTINUATION
from gptedge.tui.transcript import Note, UserMessage


def words(n: int) -> list[str]:
    return [f"word{i} " for i in range(n)]


async def test_a_reply_appears_while_it_is_made(drive: Any) -> None:
    gate = threading.Event()
    async with drive(FakeModel([Turn(["Hello ", "there"], gate=gate, gate_at=1)])) as d:
        await d.ready()
        await d.send("hi", wait=False)
        await d.until(lambda: "Hello" in d.screen)
        assert "there" not in d.screen
        assert "answering" in d.screen
        gate.set()
        await d.idle()
        assert "Hello there" in d.screen
        assert "hi" in d.screen
        assert "answering" not in d.screen


async def test_the_status_line_tells_model_context_and_speed(drive: Any) -> None:
    async with drive(FakeModel([Turn(["Hello"])])) as d:
        await d.ready()
        await d.send("hi")
        bottom = d.screen.splitlines()[-1]
        assert "fake-model · int4" in bottom
        assert "11 / 2,048 tokens" in bottom  # 10 of the prompt and 1
        assert "87 tok/s" in bottom
        assert "first after 0.12 s" in bottom


async def test_a_full_context_is_said(drive: Any) -> None:
    async with drive(FakeModel([Turn(["Hello"], dropped_tokens=321)])) as d:
        await d.ready()
        await d.send("hi")
        assert "no longer sees the oldest 321 tokens" in d.screen


async def test_the_window_is_there_before_the_model(drive: Any) -> None:
    gate = threading.Event()
    model = FakeModel([Turn(["Hello"])])

    def load() -> FakeModel:
        assert gate.wait(8)
        return model

    async with drive(model, load=load) as d:
        await d.until(lambda: "loading" in d.screen)
        await d.send("early bird", wait=False)  # is answered once the model is there
        await d.send("second", wait=False)  # is not lost either
        await d.until(lambda: d.app.composer.text == "second")
        gate.set()
        await d.until(lambda: "Hello" in d.screen)
        await d.idle()
        assert "loading" not in d.screen.splitlines()[-1]
    assert model.asked == [[{"role": "user", "content": "early bird"}]]


async def test_escape_keeps_what_has_come(drive: Any) -> None:
    gate = threading.Event()
    model = FakeModel([Turn([*words(5), "never"], gate=gate, gate_at=5), Turn(["second"])])
    async with drive(model) as d:
        await d.ready()
        await d.send("count", wait=False)
        await d.until(lambda: "word4" in d.screen)
        await d.pilot.press("escape")
        await d.idle()
        assert d.replies[-1].note == "stopped"
        assert "stopped" in d.screen
        assert d.app.chat.messages[-1] == {"role": "assistant", "content": "".join(words(5))}
        await d.send("go on")
        assert "second" in d.screen
    assert [m["role"] for m in model.asked[1]] == ["user", "assistant", "user"]


async def test_escape_before_anything_came_gives_the_question_back(drive: Any) -> None:
    model = FakeModel([Turn(["late"], gate=threading.Event())])
    async with drive(model) as d:
        await d.ready()
        await d.send("a question", wait=False)
        await d.until(lambda: d.app.reply is not None)
        await d.pilot.press("escape")
        await d.idle()
        assert d.app.composer.text == "a question"
        assert not d.app.transcript.query(UserMessage)
        assert d.app.chat.messages == []


async def test_control_c_stops_and_then_quits(drive: Any) -> None:
    model = FakeModel([Turn(words(3), gate=threading.Event(), gate_at=2)])
    async with drive(model) as d:
        await d.ready()
        await d.send("count", wait=False)
        await d.until(lambda: "word1" in d.screen)
        await d.pilot.press("ctrl+c")
        await d.idle()
        assert d.replies[-1].note == "stopped"
        assert d.app.is_running
        await d.pilot.press("ctrl+c")
        await d.until(lambda: not d.app.is_running)
    assert d.app.return_code == 0
    assert model.closed


async def test_control_c_copies_what_is_selected(drive: Any) -> None:
    async with drive(FakeModel([Turn(["ok"])])) as d:
        await d.ready()
        d.app.composer.insert("some words")
        d.app.composer.select_all()
        await d.pilot.press("ctrl+c")
        await d.pilot.pause()
        assert d.app.clipboard == "some words"
        assert d.app.is_running


async def test_several_turns_share_one_chat(drive: Any) -> None:
    model = FakeModel([Turn(["one"]), Turn(["two"]), Turn(["three"])])
    async with drive(model, system="Be brief.") as d:
        await d.ready()
        for question in ("a", "b", "c"):
            await d.send(question)
        assert [r.text for r in d.replies] == ["one", "two", "three"]
    assert len(model.chats) == 1
    assert [m["content"] for m in model.asked[2]] == ["Be brief.", "a", "one", "b", "two", "c"]


async def test_regenerating_replaces_the_last_reply(drive: Any) -> None:
    model = FakeModel([Turn(["first"]), Turn(["another"])])
    async with drive(model) as d:
        await d.ready()
        await d.pilot.press("ctrl+r")  # nothing to answer yet
        await d.send("q")
        await d.pilot.press("ctrl+r")
        await d.until(lambda: len(model.asked) == 2)
        await d.idle()
        assert [r.text for r in d.replies] == ["another"]
        assert d.app.chat.messages[-1]["content"] == "another"
        assert "first" not in d.screen.replace("first after", "")
    assert model.changes[1] == {"temperature": 0.7}  # greedy would say "first" again


async def test_regenerating_that_is_stopped_at_once_leaves_the_old_reply(drive: Any) -> None:
    model = FakeModel([Turn(["first"]), Turn(["another"], gate=threading.Event())])
    async with drive(model) as d:
        await d.ready()
        await d.send("q")
        await d.pilot.press("ctrl+r")
        await d.until(lambda: len(model.asked) == 2)
        await d.pilot.press("escape")
        await d.idle()
        assert [r.text for r in d.replies] == ["first"]
        assert d.app.composer.text == ""


async def test_regenerating_that_is_stopped_in_the_middle_leaves_the_old_reply(drive: Any) -> None:
    cut = Turn(words(3), gate=threading.Event(), gate_at=2)
    model = FakeModel([Turn(["first"]), cut, Turn(["second"])])
    async with drive(model) as d:
        await d.ready()
        await d.send("q")
        await d.pilot.press("ctrl+r")
        await d.until(lambda: "word1" in d.screen)
        await d.pilot.press("escape")
        await d.idle()
        assert [r.text for r in d.replies] == ["first"]
        assert "word1" not in d.screen
        assert store.read(d.app.file.path).messages[-1]["content"] == "first"
        await d.send("more")
    assert [m["content"] for m in model.asked[2]] == ["q", "first", "more"]


async def test_regenerating_while_a_reply_runs_stops_it_first(drive: Any) -> None:
    model = FakeModel([Turn(words(3), gate=threading.Event(), gate_at=2), Turn(["anew"])])
    async with drive(model) as d:
        await d.ready()
        await d.send("q", wait=False)
        await d.until(lambda: "word1" in d.screen)
        await d.pilot.press("ctrl+r")
        await d.until(lambda: [r.text for r in d.replies] == ["anew"])


async def test_a_new_conversation_forgets_but_keeps_the_old_file(drive: Any) -> None:
    model = FakeModel([Turn(["one"]), Turn(["two"])])
    async with drive(model, system="Be brief.") as d:
        await d.ready()
        await d.send("a")
        before = d.app.file.path
        await d.pilot.press("ctrl+n")
        await d.until(lambda: not d.replies)
        await d.send("b")
        assert "one" not in d.screen
        assert d.app.file.path != before
        assert store.read(before).messages[-1]["content"] == "one"
    assert [m["content"] for m in model.asked[1]] == ["Be brief.", "b"]


async def test_an_error_is_one_line_and_the_question_comes_back(drive: Any) -> None:
    error = ContextOverflowError("the prompt has 9 tokens\nand the context holds 8")
    async with drive(FakeModel([Turn([], error=error, when="ask"), Turn(["fine"])])) as d:
        await d.ready()
        await d.send("too much")
        notes = [n.text for n in d.app.transcript.query(Note) if n.has_class("error")]
        assert notes == ["the prompt has 9 tokens and the context holds 8"]
        assert d.app.composer.text == "too much"
        await d.pilot.press("enter")
        await d.idle()
        assert "fine" in d.screen


async def test_an_error_in_the_middle_keeps_what_has_come(drive: Any) -> None:
    async with drive(FakeModel([Turn(["half "], error=BundleError("the model was closed"))])) as d:
        await d.ready()
        await d.send("q")
        assert "half" in d.screen
        assert "the model was closed" in d.screen
        assert d.app.composer.text == ""
        assert d.app.chat.messages[-1]["content"] == "half "


async def test_unforeseen_errors_say_their_type(drive: Any) -> None:
    async with drive(FakeModel([Turn([], error=RuntimeError("odd"), when="ask")])) as d:
        await d.ready()
        await d.send("q")
        assert "RuntimeError: odd" in d.screen


async def test_a_load_error_ends_the_app_with_it(drive: Any) -> None:
    def load() -> FakeModel:
        raise BundleError("no such bundle")

    async with drive(FakeModel([]), load=load) as d:
        await d.until(lambda: not d.app.is_running)
    assert isinstance(d.app.return_value, BundleError)


async def test_quitting_while_a_reply_runs(drive: Any) -> None:
    model = FakeModel([Turn(words(2000), delay=0.005)])
    async with drive(model) as d:
        await d.ready()
        await d.send("long", wait=False)
        await d.until(lambda: "word3" in d.screen)
        start = time.perf_counter()
        await d.pilot.press("ctrl+q")
        await d.until(lambda: not d.app.is_running)
    assert time.perf_counter() - start < 2
    assert not d.app.reply.is_alive()
    saved = store.read(d.app.file.path).messages
    assert saved[-1]["role"] == "assistant"
    assert saved[-1]["content"].startswith("word0 word1 ")


async def test_every_turn_is_saved_and_can_be_resumed(drive: Any, tmp_path: Path) -> None:
    async with drive(FakeModel([Turn(["**one**"])]), system="Be brief.") as d:
        await d.ready()
        await d.send("a [b]")
        saved = store.latest(tmp_path / "chats")  # while the app runs
    assert [m["content"] for m in saved.messages] == ["Be brief.", "a [b]", "**one**"]
    assert saved.path.stat().st_mode & 0o077 == 0
    assert [p.name for p in saved.path.parent.iterdir()] == [saved.path.name]

    model = FakeModel([Turn(["two"])])
    file = store.ChatFile(saved.path, "fake", saved.messages)
    async with drive(model, file=file, resumed=saved.messages) as d:
        await d.ready()
        assert "a [b]" in d.screen
        assert "one" in d.screen
        await d.pilot.press("up")
        assert d.app.composer.text == "a [b]"
        d.app.composer.clear()
        await d.send("b")
    assert [m["content"] for m in model.asked[0]] == ["Be brief.", "a [b]", "**one**", "b"]
    assert len(list((tmp_path / "chats").iterdir())) == 1
    assert store.latest(tmp_path / "chats").messages[-1]["content"] == "two"


async def test_a_conversation_that_cannot_be_saved_goes_on(drive: Any, tmp_path: Path) -> None:
    (tmp_path / "not-a-folder").write_text("")
    file = store.ChatFile.new(tmp_path / "not-a-folder" / "chats", "fake")
    async with drive(FakeModel([Turn(["fine"])]), file=file) as d:
        await d.ready()
        await d.send("q")
        assert "fine" in d.screen
        assert "cannot be saved" in d.screen


async def test_a_model_that_only_continues_says_so_once(drive: Any) -> None:
    async with drive(FakeModel([Turn(["upon a time"])], is_continuation=True)) as d:
        await d.ready()
        await d.send("Once")
        await d.send("more")
        assert [n.text for n in d.app.transcript.query(Note)].count(CONTINUATION) == 1


async def test_a_reply_cut_off_by_its_limit_says_so(drive: Any) -> None:
    async with drive(FakeModel([Turn(["half"], finish="length")])) as d:
        await d.ready()
        await d.send("q")
        assert "cut off after 1 tokens" in d.screen


async def test_an_empty_reply_is_visible(drive: Any) -> None:
    async with drive(FakeModel([Turn([""])])) as d:
        await d.ready()
        await d.send("q")
        assert "empty reply" in d.screen
