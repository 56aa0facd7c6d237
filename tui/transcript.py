"""The conversation on the screen: what the user said, what the model says, and notes between them.

Knows nothing of models or threads. It follows the end while text comes, unless the user has scrolled up.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from markdown_it import MarkdownIt
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from gptedge.text import without_controls

WAITING = "…"


class UserMessage(Static):
    """The user's own words, exactly as typed."""

    def __init__(self, text: str) -> None:
        super().__init__(without_controls(text), markup=False)
        self.text = text


class Note(Static):
    """A line that neither side of the conversation said."""

    def __init__(self, text: str, *, classes: str = "") -> None:
        super().__init__(without_controls(text), markup=False, classes=classes)
        self.text = text


class AssistantMessage(Vertical):
    """A reply: Markdown, and below it a note on how it ended, where that is worth saying."""

    def __init__(self, text: str | None = None) -> None:
        """`text` is a whole reply; None is one that is still to come."""
        super().__init__()
        self.text = text or ""
        self.is_streaming = text is None
        self._markdown = Markdown(without_controls(self.text), parser_factory=_parser)
        self._note = Static(WAITING if self.is_streaming else _remark(self.text), markup=False, classes="remark")
        self._stream: MarkdownStream | None = None

    def compose(self) -> ComposeResult:
        yield self._markdown
        yield self._note

    def on_mount(self) -> None:
        self._note.display = bool(self._note.content)

    @property
    def note(self) -> str:
        return str(self._note.content)

    async def append(self, text: str) -> None:
        """Show some more text."""
        if not text:
            return
        if self._stream is None:
            self._stream = Markdown.get_stream(self._markdown)
            self._say("")
        self.text += text
        await self._stream.write(without_controls(text))

    def finish(self, text: str, note: str) -> None:
        """Show the whole text once more, parsed as one: pieces can misread a code fence. Returns before it is done."""
        self.text, self.is_streaming = text, False
        self._say(note or _remark(text))
        self.run_worker(self._show(text), exit_on_error=False)

    async def _show(self, text: str) -> None:
        if self._stream is not None:
            with suppress(Exception):  # whatever a piece led to, the whole is shown below
                await self._stream.stop()
        await self._markdown.update(without_controls(text))

    def _say(self, note: str) -> None:
        self._note.update(note)
        self._note.display = bool(note)


def _remark(text: str) -> str:
    return "" if text.strip() else "empty reply"


class Transcript(VerticalScroll, can_focus=False):
    """All messages, the newest at the end."""

    def on_mount(self) -> None:
        self.anchor()

    async def add(self, widget: UserMessage | AssistantMessage | Note) -> None:
        await self.mount(widget)
        self.follow()

    def follow(self) -> None:
        """Go to the end, and stay there as it moves."""
        self.scroll_end(animate=False)

    async def show(self, messages: list[dict[str, str]]) -> None:
        """Replace everything by these messages."""
        await self.remove_children()
        makers: dict[str, Any] = {"user": UserMessage, "assistant": AssistantMessage, "system": _system_note}
        await self.mount_all([makers[m["role"]](m["content"]) for m in messages])
        self.follow()


def _system_note(text: str) -> Note:
    return Note(f"system: {text}")


def _parser() -> MarkdownIt:
    """Markdown as chats use it: line breaks count, and HTML is text (Textual would drop it)."""
    parser = MarkdownIt("gfm-like", {"html": False})
    parser.core.ruler.push("keep_line_breaks", _keep_line_breaks)
    return parser


def _keep_line_breaks(state: Any) -> None:
    for token in state.tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
