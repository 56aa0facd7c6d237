"""The keyboard and the mouse of the chat app."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from tui_fakes import FakeModel, Turn

from gptedge.config import SamplingParams
from gptedge.tui.common import changes_to_regenerate


def words(n: int) -> list[str]:
    return [f"word{i} " for i in range(n)]


async def test_a_second_question_waits_in_the_box(drive: Any) -> None:
    gate = threading.Event()
    model = FakeModel([Turn(["a", "b"], gate=gate, gate_at=1)])
    async with drive(model) as d:
        await d.ready()
        await d.send("one", wait=False)
        await d.until(lambda: d.app.reply is not None)
        await d.send("two", wait=False)
        await d.until(lambda: "Esc stops the reply first" in d.screen)
        assert d.app.composer.text == "two"
        gate.set()
        await d.idle()
    assert len(model.asked) == 1


async def test_keys_of_the_box(drive: Any) -> None:
    async with drive(FakeModel([Turn(["ok"])])) as d:
        await d.ready()
        await d.pilot.press("a", "ctrl+j", "b", "shift+enter", "c")
        assert d.app.composer.text == "a\nb\nc"
        assert d.app.composer.size.height == 3
        await d.pilot.press("enter")
        await d.idle()
        await d.send("later")
        box = d.app.composer
        await d.pilot.press("up")
        assert box.text == "later"
        await d.pilot.press("up")
        assert box.text == "a\nb\nc"
        await d.pilot.press("up")  # within the text now
        assert box.text == "a\nb\nc"
        await d.pilot.press("end", "!", "up", "up", "up")
        assert box.text == "a\nb!\nc"  # what was changed is not replaced
        box.load_text("")
        await d.pilot.press("up", "down")
        assert box.text == ""
        await d.pilot.press("enter")  # nothing to send
        await d.pilot.pause()
        assert len(d.replies) == 2


async def test_control_c_clears_what_is_not_sent_before_it_quits(drive: Any) -> None:
    async with drive(FakeModel([Turn(["ok"])])) as d:
        await d.ready()
        d.app.composer.insert("a long draft\nof two lines ")
        await d.pilot.press("ctrl+c")
        await d.pilot.pause()
        assert d.app.is_running
        assert d.app.composer.text == ""
        await d.pilot.press("up")
        assert d.app.composer.text == "a long draft\nof two lines "
        await d.pilot.press("ctrl+c")
        await d.pilot.press("ctrl+c")
        await d.until(lambda: not d.app.is_running)


async def test_keys_typed_fast_are_sent_in_order(drive: Any) -> None:
    model = FakeModel([Turn(["ok"])])
    async with drive(model) as d:
        await d.ready()
        for key in "quick fox":  # without waiting for each to arrive, as a paste or a fast typist
            d.app.post_message(_key("space" if key == " " else key, key))
        d.app.post_message(_key("enter", "\r"))
        d.app.post_message(_key("z", "z"))
        await d.until(lambda: model.asked)
        await d.idle()
        assert d.app.composer.text == "z"
    assert model.asked[0][0]["content"] == "quick fox"


def _key(key: str, character: str) -> Any:
    from textual.events import Key

    return Key(key, character)


async def test_a_click_on_the_transcript_leaves_the_keyboard_in_the_box(drive: Any) -> None:
    async with drive(FakeModel([Turn(["ok"])])) as d:
        await d.ready()
        await d.send("q")
        await d.pilot.click("Transcript")
        await d.pilot.pause(0.1)
        await d.pilot.press("x")
        assert d.app.composer.text == "x"


async def test_commands_that_are_typed(drive: Any) -> None:
    model = FakeModel([Turn(["one"]), Turn(["two"])])
    async with drive(model) as d:
        await d.ready()
        await d.send("/help")
        assert "/regenerate" in d.screen
        await d.send("/exit")
        assert "/exit is no command" in d.screen
        await d.send("/etc/hosts is what?")
        await d.send("/regenerate")
        await d.until(lambda: "two" in d.screen)
        await d.idle()
        assert [m["content"] for m in d.app.chat.messages] == ["/etc/hosts is what?", "two"]
        await d.send("/new")
        await d.until(lambda: "two" not in d.screen)
        assert d.app.chat.messages == []
        await d.send("/quit", wait=False)
        await d.until(lambda: not d.app.is_running)
    assert len(model.asked) == 2


async def test_again_before_an_answer_gives_the_question_back_and_leaves_the_answer_before(drive: Any) -> None:
    late = Turn(["late"], gate=threading.Event())
    async with drive(FakeModel([Turn(["first answer"]), late, Turn(["another"])])) as d:
        await d.ready()
        await d.send("Q1")
        await d.send("Q2", wait=False)
        await d.until(lambda: d.app.reply is not None)
        await d.pilot.press("ctrl+r")
        await d.until(lambda: d.app.composer.text == "Q2")
        await d.idle()
        assert [m["content"] for m in d.app.chat.messages] == ["Q1", "first answer"]
        assert [m.text for m in d.replies] == ["first answer"]


@pytest.mark.parametrize("key", ["ctrl+n", "ctrl+r"])
async def test_while_loading_keys_say_so(drive: Any, key: str) -> None:
    gate, model = threading.Event(), FakeModel([Turn(["x"])])
    async with drive(model, load=lambda: (gate.wait(8), model)[1]) as d:
        await d.until(lambda: "loading" in d.screen)
        await d.pilot.press(key)
        await d.until(lambda: "still loading" in d.screen)
        gate.set()
        await d.ready()


@pytest.mark.parametrize(("temperature", "changes"), [(0, {"temperature": 0.7, "seed": None}), (0.5, {"seed": None})])
def test_again_is_another_reply_whatever_the_seed(temperature: float, changes: dict[str, Any]) -> None:
    assert changes_to_regenerate(SamplingParams(temperature=temperature, seed=1)) == changes
