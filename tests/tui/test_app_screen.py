"""What the chat app shows: markup, code, poems, wide characters, long replies, scrolling, sizes."""

from __future__ import annotations

import threading
from typing import Any

from textual.widgets import Markdown
from textual.widgets.markdown import MarkdownFence
from tui_fakes import FakeModel, Turn

from gptedge.tui.transcript import AssistantMessage, Note


def words(n: int) -> list[str]:
    return [f"word{i} " for i in range(n)]


async def test_markup_and_html_are_shown_as_they_are(drive: Any) -> None:
    async with drive(FakeModel([Turn(["[red]not red[/red] and <b>not bold</b>\n\n<div>a block</div>"])])) as d:
        await d.ready()
        await d.send("[bold]plain[/bold] [oops")
        for text in ("[bold]plain[/bold] [oops", "[red]not red[/red]", "<b>not bold</b>", "<div>a block</div>"):
            assert text in d.screen


async def test_a_code_fence_cut_anywhere_ends_up_as_one_block(drive: Any) -> None:
    # While it comes piece by piece, Textual makes two lists of this one.
    reply = "1. Look:\n\n   ```python\n   for x in [1, 2]:\n\n       print(x)\n   ```\n2. Done.\n"
    async with drive(FakeModel([Turn(list(reply), delay=0.002)])) as d:
        await d.ready()
        await d.send("code")
        await d.until(lambda: len(d.app.query("MarkdownOrderedList")) == 1)
        assert d.app.query_one(MarkdownFence).code == "for x in [1, 2]:\n\n    print(x)"
        assert "```" not in d.screen
        assert "    print(x)" in d.screen
        assert len(d.replies[0].query(Markdown)) == 1


async def test_long_lines_of_code_wrap(drive: Any) -> None:
    names = [f"argument_{i}" for i in range(20)]
    async with drive(FakeModel([Turn([f"```python\ncall({', '.join(names)})\nshort()\n```\n"])]), size=(60, 24)) as d:
        await d.ready()
        await d.send("code")
        await d.until(lambda: "short()" in d.screen)
        assert [name for name in names if name not in d.screen] == []


async def test_lines_of_a_poem_stay_lines(drive: Any) -> None:
    async with drive(FakeModel([Turn(["Roses are red,\nviolets are blue."])])) as d:
        await d.ready()
        await d.send("poem")
        assert "red, violets" not in d.screen


async def test_wide_characters(drive: Any) -> None:
    async with drive(FakeModel([Turn(["重力", "是", "👩‍🚀🎉", "一種力"])]), size=(40, 20)) as d:
        await d.ready()
        await d.send("什麼是重力？🌍")
        assert "什麼是重力？🌍" in d.screen
        assert "重力是" in d.screen
        assert d.replies[0].text == "重力是👩‍🚀🎉一種力"


async def test_a_very_long_reply_leaves_the_keyboard_alive(drive: Any, monkeypatch: Any) -> None:
    pieces = [f"word{i} " + ("\n\n" if i % 40 == 39 else "") for i in range(5000)]
    shown: list[str] = []
    append = AssistantMessage.append

    async def counted(self: AssistantMessage, text: str) -> None:
        shown.append(text)
        await append(self, text)

    monkeypatch.setattr(AssistantMessage, "append", counted)
    parsed: list[str] = []
    update = Markdown.update
    monkeypatch.setattr(Markdown, "update", lambda self, text: (parsed.append(text), update(self, text))[1])
    async with drive(FakeModel([Turn(pieces, delay=0.0006)]), size=(60, 12)) as d:
        await d.ready()
        await d.send("long", wait=False)
        await d.until(lambda: d.app.reply is not None)
        while d.app.reply is not None:
            await d.pilot.press("x")
        await d.idle()
        assert len(d.app.composer.text) > 1
        assert d.app.composer.text.strip("x") == ""
        assert d.replies[0].text == "".join(pieces)
        await d.until(lambda: "word4999" in d.screen)  # it followed the end
    assert 2 < len(shown) < 500
    assert [text for text in parsed if len(text) > 1000] == ["".join(pieces)], "the whole is parsed once, at the end"
    assert max(map(len, shown)) < 5000


async def test_scrolling_up_while_text_comes_is_respected(drive: Any) -> None:
    gate = threading.Event()
    pieces = [f"line {i}\n\n" for i in range(60)]
    async with drive(FakeModel([Turn(pieces, gate=gate, gate_at=40)])) as d:
        await d.ready()
        await d.send("long", wait=False)
        await d.until(lambda: "line 39" in d.screen)
        await d.pilot.press("pageup", "pageup")
        await d.pilot.pause(0.1)
        before = d.app.transcript.scroll_y
        gate.set()
        await d.idle()
        await d.pilot.pause(0.2)
        assert d.app.transcript.scroll_y == before
        assert "line 59" not in d.screen
        await d.pilot.press("ctrl+end")
        await d.until(lambda: "line 59" in d.screen)


async def test_narrow_and_resized(drive: Any) -> None:
    async with drive(
        FakeModel([Turn(["A sentence that is longer than the window is wide. " * 3])]), size=(40, 12)
    ) as d:
        await d.ready()
        await d.send("a question that is wider than forty columns, surely")
        assert all(len(line) <= 40 for line in d.screen.splitlines())
        assert "/ 2,048 tokens" in d.screen
        await d.pilot.resize_terminal(140, 50)
        await d.pilot.pause(0.1)
        assert "a question that is wider than forty columns, surely" in d.screen
        await d.pilot.resize_terminal(10, 5)
        await d.pilot.pause(0.1)
        assert d.app.is_running


async def test_the_terminal_obeys_no_text(drive: Any) -> None:
    bad = "a\x1b[2Jb\x1b]52;c;cHduZWQ=\x1b\\c\x9bd"
    async with drive(FakeModel([Turn([bad[:3], bad[3:]])])) as d:
        await d.ready()
        await d.send(bad)
        await d.app.transcript.add(Note(bad))
        shown = [s.text for line in d.app.screen._compositor.render_strips() for s in line]
        assert "\x1b" not in "".join(shown)
        assert "\x9b" not in "".join(shown)
        assert "".join(shown).count("a\\u{1b}[2Jb") >= 2
        assert d.replies[0].text == bad, "what is copied and kept"
