"""A chat line by line, for pipes, screen readers and terminals of any kind. Does not import Textual.

On a terminal it prompts, and Ctrl+C stops the reply; in a pipe it answers line after line and ends at the first error.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from gptedge.errors import DataError, GptEdgeError
from gptedge.text import decode_utf8
from gptedge.tui.common import CONTINUATION, answer_to, changes_to_regenerate, dropped, is_command, one_line
from gptedge.tui.store import ChatFile

if TYPE_CHECKING:
    from gptedge import Chat, Model, Result, Stream

PROMPT = "> "


class Repl:
    """Reads questions from standard input, writes replies to standard output, and all else to standard error."""

    def __init__(self, model: Model, chat: Chat, file: ChatFile | None, *, silent: bool = False) -> None:
        """`file` None keeps nothing on disk. `silent` prints no replies; they are in `results`."""
        self.model, self.chat, self.file, self._silent = model, chat, file, silent
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty() and not silent
        self.results: list[Result] = []

    def run(self) -> None:
        """Answer until the input ends, /quit, or Ctrl+C at the prompt."""
        self._introduce()
        try:
            for line in _lines(self.interactive):
                if line == "/quit":
                    return
                self._obey(line)
        finally:
            self._save()

    def _introduce(self) -> None:
        if not self.interactive:
            return
        if self.model.chat_template.is_continuation:
            _say(CONTINUATION)
        _say("/help lists the commands; Ctrl+D leaves.")

    def _obey(self, line: str) -> None:
        match line:
            case "":
                pass
            case "/new":
                self._new()
            case "/regenerate":
                self._answer(lambda: self.chat.regenerate(**changes_to_regenerate(self.chat.params)))
            case _ if is_command(line):
                _say(answer_to(line))
            case _:
                self._answer(lambda: self.chat.stream(line))

    def _new(self) -> None:
        self._save()
        self.chat.clear()
        if self.file is not None:
            self.file = ChatFile.new(self.file.path.parent, self.file.bundle)

    def _answer(self, start: Callable[[], Stream]) -> None:
        try:
            with start() as stream, _interrupt_cancels(stream, active=self.interactive):
                for chunk in stream:
                    self._write(chunk.text)
        except GptEdgeError as e:
            if not self.interactive:
                raise
            _say(f"gptedge: {one_line(e)}")
            return
        finally:
            self._save()
        self._write("\n")
        self.results.append(stream.result)
        if problem := dropped(stream.result):
            _say(f"[{problem}]")
        if stream.result.finish_reason == "cancelled" and self.interactive:
            _say("[stopped]")

    def _write(self, text: str) -> None:
        if not self._silent:
            sys.stdout.write(text)
            sys.stdout.flush()

    def _save(self) -> None:
        if self.file is not None and (problem := self.file.save(self.chat.messages)):
            _say(f"gptedge: {problem}")


def _lines(interactive: bool) -> Iterator[str]:
    """What the user writes, line by line. Raises DataError where it is not UTF-8."""
    if interactive:
        yield from _typed_lines()
        return
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield decode_utf8(line, f"line {number} of standard input").strip()


def _typed_lines() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` arrow keys and history)
    while True:
        try:
            line = input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if any("\ud800" <= c <= "\udfff" for c in line):  # how Python passes on bytes that are not UTF-8
            raise DataError("this line is not UTF-8 text; set the terminal to UTF-8")
        yield line.strip()


@contextmanager
def _interrupt_cancels(stream: Stream, *, active: bool) -> Iterator[None]:
    """Within, Ctrl+C ends the reply in order instead of tearing through it; a second one is an interrupt as ever."""
    if not active:
        yield
        return

    def cancel(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        # Not here: the handler runs on the thread that may be holding the lock which cancelling takes.
        threading.Thread(target=stream.cancel).start()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
