"""Where the user writes. Enter sends; Shift+Enter or Ctrl+J begins a new line; Up recalls what was sent before."""

from __future__ import annotations

from dataclasses import dataclass

from textual import events
from textual.message import Message
from textual.widgets import TextArea

PLACEHOLDER = "Ask anything"


class Composer(TextArea):
    """A box that grows with its text."""

    @dataclass
    class Sent(Message):
        text: str

    def __init__(self) -> None:
        super().__init__(compact=True, soft_wrap=True, highlight_cursor_line=False, placeholder=PLACEHOLDER)
        self._sent: list[str] = []
        self._recalled: int | None = None
        """Index in `_sent` of what is being edited."""

    async def _on_key(self, event: events.Key) -> None:
        # Not as priority bindings: those overtake letters that are typed but not yet in the box.
        match event.key:
            case "enter":
                self._send()
            case "ctrl+j" | "shift+enter" | "alt+enter":
                self.insert("\n")
            case _:
                await super()._on_key(event)
                return
        event.stop()
        event.prevent_default()

    def _send(self) -> None:
        """Hand the text over and clear the box; who cannot take it gives it back."""
        if text := self.text.strip():
            self.remember(text)
            self.load_text("")
            self.post_message(self.Sent(text))

    def remember(self, text: str) -> None:
        """Let Up recall `text`."""
        if not self._sent or self._sent[-1] != text:
            self._sent.append(text)
        self._recalled = None

    def put_aside(self) -> None:
        """Clear the box; Up recalls what was in it."""
        if self.text.strip():
            self.remember(self.text)
        self.load_text("")

    def give_back(self, text: str) -> None:
        """Put `text` before what is being written."""
        self._put(f"{text}\n{self.text}" if self.text else text)

    def action_cursor_up(self, select: bool = False) -> None:
        at = self._place()
        if select or not at or not self.cursor_at_first_line:
            super().action_cursor_up(select)
        else:
            self._recall(at - 1)

    def action_cursor_down(self, select: bool = False) -> None:
        at = self._place()
        if select or at is None or not self.cursor_at_last_line:
            super().action_cursor_down(select)
        else:
            self._recall(at + 1)

    def _place(self) -> int | None:
        """Where in `_sent` we are: behind it in an empty box, nowhere in a text of which a word would be lost."""
        if self._recalled is not None and self.text == self._sent[self._recalled]:
            return self._recalled
        return None if self.text else len(self._sent)

    def _recall(self, index: int) -> None:
        self._recalled = index if index < len(self._sent) else None
        self._put("" if self._recalled is None else self._sent[index])

    def _put(self, text: str) -> None:
        self.load_text(text)
        self.move_cursor(self.document.end)
