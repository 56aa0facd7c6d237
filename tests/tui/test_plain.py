"""The line by line chat: in a pipe, on a terminal, and what each command does."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tui_fakes import FakeModel, Turn

from gptedge.errors import ContextOverflowError, DataError
from gptedge.tui import store
from gptedge.tui.common import COMMANDS
from gptedge.tui.plain import Repl

FAKES = Path(__file__).parent / "tui_fakes.py"
needs_pty = pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")


def piped(monkeypatch: pytest.MonkeyPatch, model: FakeModel, data: bytes, **options: Any) -> Repl:
    stdin = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stdin)
    repl = Repl(model, model.chat(), options.pop("file", None), **options)  # type: ignore[arg-type]
    repl.run()
    return repl


def test_a_pipe_gets_replies_and_nothing_else(monkeypatch: Any, capsys: Any) -> None:
    model = FakeModel([Turn(["Hel", "lo"]), Turn(["Fine"])])
    piped(monkeypatch, model, "hi\n\nand you? 重力 🎉\n".encode())
    assert capsys.readouterr() == ("Hello\nFine\n", "")
    assert model.asked[1][-1]["content"] == "and you? 重力 🎉"
    assert len(model.asked[1]) == 3


def test_says_what_a_full_context_left_out(monkeypatch: Any, capsys: Any) -> None:
    piped(monkeypatch, FakeModel([Turn(["one"], dropped_tokens=321), Turn(["two"])]), b"a\nb\n")
    assert capsys.readouterr() == (
        "one\ntwo\n",
        "[the context was full; the model no longer sees the oldest 321 tokens]\n",
    )


def test_commands(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    model = FakeModel([Turn(["one"]), Turn(["two"]), Turn(["three"])])
    file = store.ChatFile.new(tmp_path, "fake")
    lines = b"a\n/regenerate\n/new\n/help\nb\n/quit\nnever\n"
    repl = piped(monkeypatch, model, lines, file=file)
    out, err = capsys.readouterr()
    assert out == "one\ntwo\nthree\n"
    assert all(name in err for name in COMMANDS)
    assert model.changes[1] == {"temperature": 0.7}
    assert model.asked[2] == [{"role": "user", "content": "b"}]
    assert repl.file is not file
    assert [store.read(p).messages[-1]["content"] for p in sorted(tmp_path.iterdir(), key=os.path.getmtime)] == [
        "two",
        "three",
    ]


def test_a_slash_that_is_no_command_is_a_question(monkeypatch: Any, capsys: Any) -> None:
    model = FakeModel([Turn(["ok"])])
    piped(monkeypatch, model, b"/etc/hosts is what?\n/etc/hosts\n/Quit\n")
    assert [asked[-1]["content"] for asked in model.asked] == ["/etc/hosts is what?", "/etc/hosts"]
    assert capsys.readouterr().err == "/Quit is no command; known are /new, /regenerate, /help, /quit\n"


def test_silent_prints_nothing_and_keeps_results(monkeypatch: Any, capsys: Any) -> None:
    repl = piped(monkeypatch, FakeModel([Turn(["ok"])]), b"a\nb\n", silent=True)
    assert capsys.readouterr() == ("", "")
    assert [r.text for r in repl.results] == ["ok", "ok"]


def test_what_is_not_utf8_is_refused(monkeypatch: Any) -> None:
    model = FakeModel([Turn(["ok"])])
    with pytest.raises(DataError, match="line 2 of standard input is not UTF-8"):
        piped(monkeypatch, model, b"fine\nh\xffi\n")
    assert len(model.asked) == 1


def test_in_a_pipe_an_error_ends_it(monkeypatch: Any) -> None:
    with pytest.raises(ContextOverflowError):
        piped(monkeypatch, FakeModel([Turn([], error=ContextOverflowError("full"), when="ask")]), b"a\nb\n")


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *arguments: str, size: tuple[int, int] = (24, 80)) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        self.attributes = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm-256color", "PYTHON_COLORS": "0"},
        )
        self.seen = ""

    def until(self, pattern: str, seconds: float = 20.0) -> str:
        """Read until `pattern` is seen; returns what came before its end, which is then forgotten."""
        import select

        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            ready = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, f"no {pattern!r} in {self.seen[-2000:]!r}"
            self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
        before, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return before

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt_at_prompt(self) -> None:
        """Ctrl+C once the program waits for a key: one that comes before, as no person's does, readline leaves
        unseen until the line's end."""
        status, asleep = Path(f"/proc/{self.process.pid}/stat"), 0
        while asleep < 10:
            time.sleep(0.02)
            sleeps = not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "S"
            asleep = asleep + 1 if sleeps else 0
        self.send("\x03")

    def end(self, seconds: float = 10.0) -> int:
        """Wait for the program, reading what it still writes; its exit code."""
        import select

        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.05)[0]:
                self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
        return self.process.wait(0.1)

    def restored(self) -> bool:
        """The terminal's settings are what they were before the program."""
        import termios

        return termios.tcgetattr(self._theirs) == self.attributes

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.fd)
        os.close(self._theirs)


@needs_pty
def test_on_a_terminal_control_c_stops_the_reply_and_keeps_it(tmp_path: Path) -> None:
    with Terminal(str(FAKES), "plain", str(tmp_path)) as t:
        t.until("> ")
        t.send("count\n")
        t.until("word3 ")
        t.send("\x03")
        assert "word399" not in t.until(r"\[stopped\]\s+> ")
        kept = store.latest(tmp_path).messages[-1]["content"]
        assert kept.startswith("word0 word1 word2 word3 ")
        t.send("go on\n")
        t.until("word1 ")
        t.send("\x03")
        t.until("> ")
        t.interrupt_at_prompt()
        assert t.end() == 0
    assert len(store.latest(tmp_path).messages) == 4


@needs_pty
def test_on_a_terminal_a_new_answer_that_is_stopped_leaves_the_old_one(tmp_path: Path) -> None:
    with Terminal(str(FAKES), "plain", str(tmp_path), "6") as t:
        t.until("> ")
        t.send("count\n")
        t.until(r"word5 \s+> ")
        t.send("/regenerate\n")
        t.until("word1 ")
        t.send("\x03")
        t.until(r"\[stopped; the reply before it is kept\]\s+> ")
        t.send("\x04")
        assert t.end() == 0
    assert store.latest(tmp_path).messages[-1]["content"] == "word0 word1 word2 word3 word4 word5 "


@needs_pty
def test_on_a_terminal_control_c_drops_a_line_that_is_not_sent(tmp_path: Path) -> None:
    pytest.importorskip("readline")
    with Terminal(str(FAKES), "plain", str(tmp_path)) as t:
        t.until("> ")
        t.send("half a question")
        t.until("half a question")
        t.interrupt_at_prompt()
        t.until("> ")
        t.send("count\n")
        t.until("word1 ")
        t.send("\x03")
        t.until(r"\[stopped\]\s+> ")
        t.interrupt_at_prompt()
        assert t.end() == 0
    assert store.latest(tmp_path).messages[0]["content"] == "count"


@needs_pty
def test_on_a_terminal_control_d_leaves(tmp_path: Path) -> None:
    with Terminal(str(FAKES), "plain", str(tmp_path)) as t:
        t.until("> ")
        t.send("\x04")
        assert t.end() == 0
    assert list(tmp_path.iterdir()) == []


@needs_pty
def test_the_app_killed_in_a_reply_saves_it_and_restores_the_terminal(tmp_path: Path) -> None:
    with Terminal(str(FAKES), "app", str(tmp_path)) as t:
        t.until("Ask anything")
        t.send("count\r")
        t.until("word5")
        start = time.monotonic()
        t.process.terminate()
        assert t.end() != 0
        assert time.monotonic() - start < 5
        assert t.restored()
        assert "\x1b[?1049l" in t.seen  # back from the alternate screen
    assert store.latest(tmp_path).messages[-1]["content"].startswith("word0 word1 ")


@needs_pty
def test_the_app_whose_terminal_goes_away_saves_the_reply(tmp_path: Path) -> None:
    import signal

    with Terminal(str(FAKES), "app", str(tmp_path)) as t:
        t.until("Ask anything")
        t.send("count\r")
        t.until("word5")
        t.process.send_signal(signal.SIGHUP)
        t.end()
    assert store.latest(tmp_path).messages[-1]["content"].startswith("word0 word1 ")


@needs_pty
def test_the_app_quits_promptly_in_a_reply(tmp_path: Path) -> None:
    with Terminal(str(FAKES), "app", str(tmp_path)) as t:
        t.until("Ask anything")
        t.send("count\r")
        t.until("word5")
        start = time.monotonic()
        t.send("\x11")  # Ctrl+Q
        assert t.end() == 0
        assert time.monotonic() - start < 5
        assert t.restored()
    assert store.latest(tmp_path).messages[-1]["role"] == "assistant"


@needs_pty
def test_a_bug_in_the_app_saves_the_reply_and_prints_no_page(tmp_path: Path) -> None:
    with Terminal(str(FAKES), "crash", str(tmp_path)) as t:
        t.until("Ask anything")
        t.send("count\r")
        assert t.end() == 1
        assert t.restored()
        after = t.seen.rpartition("\x1b[?1049l")[2]
        assert "RuntimeError: a bug" in after
        assert "locals" not in after
    assert store.latest(tmp_path / "chats").messages[0]["content"] == "count"


def test_on_a_terminal_no_text_is_obeyed(monkeypatch: Any, capsys: Any) -> None:
    model: Any = FakeModel([])
    repl = Repl(model, model.chat(), None)
    for is_terminal, shown in ((True, "\\u{1b}[2J\n"), (False, "\x1b[2J\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_terminal: answer)
        repl._write("\x1b[2J\n")
        assert capsys.readouterr().out == shown
