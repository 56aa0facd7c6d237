"""A chat line by line, for pipes, screen readers and terminals of any kind. Does not import Textual.

On a terminal it prompts, and Ctrl+C stops the reply; in a pipe it answers line after line and ends at the first error.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gptedge.errors import DataError, GptEdgeError
from gptedge.text import decode_utf8, for_output
from gptedge.tui.common import CONTINUATION, UNANSWERED, answer_to, changes_to_regenerate, dropped, is_command, one_line
from gptedge.tui.store import ChatFile
from gptedge.tui.unfinished import Unfinished

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
        self._left: Unfinished | None = None
        """What an interrupt has torn through."""

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
        if self.chat.messages and self.chat.messages[-1]["role"] == "user":
            _say(UNANSWERED)
        _say("/help lists the commands; Ctrl+D leaves.")

    def _obey(self, line: str) -> None:
        match line:
            case "":
                pass
            case "/new":
                self._new()
            case "/regenerate":
                self._answer(None, **changes_to_regenerate(self.chat.params))
            case _ if is_command(line):
                _say(answer_to(line))
            case _:
                self._answer(line)

    def _new(self) -> None:
        self._save()
        if self.file is not None:  # first: the file there was must not see the conversation without its turns
            self.file = ChatFile.new(self.file.path.parent, self.file.bundle)
        self.chat.clear()

    def _answer(self, question: str | None, **changes: object) -> None:
        """`question` None answers the last one anew."""
        reply = Unfinished(self.chat, question, self.file, **changes)
        try:
            with reply.asked() as stream, _interrupt_cancels(stream, active=self.interactive):
                for text in reply.read(stream):
                    self._write(text)
        except GptEdgeError as e:
            if not self.interactive:
                raise
            _say(f"gptedge: {one_line(e)}")
            return
        except KeyboardInterrupt:
            self._left = reply
            raise
        finally:
            self._save()
        self._write("\n")
        self.results.append(stream.result)
        if problem := dropped(stream.result):
            _say(f"[{problem}]")
        if stream.result.finish_reason == "cancelled" and self.interactive:
            _say("[stopped; the reply before it is kept]" if reply.replaces else "[stopped]")

    def _write(self, text: str) -> None:
        if not self._silent:
            sys.stdout.write(for_output(text, sys.stdout))
            sys.stdout.flush()

    def _save(self) -> None:
        if self.file is None:
            return
        left = self._left  # whose question stays, without an answer
        messages = left.messages() if left is not None and left.kept is None else self.chat.messages
        for said in (self.file.save(messages), self.file.news()):
            if said:
                _say(f"gptedge: {said}")


def _lines(interactive: bool) -> Iterator[str]:
    """What the user writes, line by line. Raises DataError where it is not UTF-8."""
    if interactive:
        yield from _typed_lines()
        return
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield decode_utf8(line, f"line {number} of standard input").strip()


def _typed_lines() -> Iterator[str]:
    _typed()  # where there is readline, `input` has arrow keys and history from now on
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if _typed():
                continue
            return
        if any("\ud800" <= c <= "\udfff" for c in line):  # how Python passes on bytes that are not UTF-8
            raise DataError("this line is not UTF-8 text; set the terminal to UTF-8")
        yield line.strip()


def _typed() -> str:
    """What stands at the prompt; nothing where that cannot be told."""
    try:
        import readline
    except ImportError:
        return ""
    return readline.get_line_buffer()


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
