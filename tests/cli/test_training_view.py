"""The view of a run: what it shows at each size, when it is lines instead, and that the terminal is given back."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gptedge.cli.training_view import View, duration, training_view
from gptedge.train.trainer import StepReport


def report(step: int, **changes: Any) -> StepReport:
    values = {
        "step": step,
        "max_steps": 1000,
        "loss": 9.0 - step / 200,
        "val_loss": 9.25 - step / 200 if step % 100 == 0 else None,
        "tokens_per_second": 12_345.0,
        "learning_rate": 3e-4,
        "grad_norm": 0.75,
        "elapsed_s": step / 10,
        "eta_s": (1000 - step) / 10,
        "best_val_loss": 9.25 - step // 100 * 100 / 200 if step >= 100 else None,
        "best_step": step // 100 * 100 or None,
    }
    return StepReport(**{**values, **changes})


def terminal(width: int, height: int, **settings: Any) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, highlight=False, **settings)


def frame(width: int, height: int, *, sample: str | None = None, steps: int = 400) -> list[str]:
    view = View("train mine")
    for i in range(1, steps + 1):
        view.add(report(i))
    view.sample = None if sample is None else (400, sample)
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(view)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [20, 45, 80, 120, 250])
@pytest.mark.parametrize("height", [6, 14, 24, 60])
def test_every_size_holds_the_picture(width: int, height: int) -> None:
    lines = frame(width, height, sample="ein Satz 中文 🙂 " * 30)
    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, 9), "a curve and a sample only where there is room"
    assert any("loss" in line for line in lines)


@pytest.mark.parametrize(("width", "height"), [(80, 30), (120, 30)])
def test_everything_is_shown_where_there_is_room(width: int, height: int) -> None:
    text = "\n".join(frame(width, height, sample="It was a dark [bold] night"))
    for part in ("train mine", "40 s · 1 m 00 s left", "40%  step 400 of 1,000", "12,345", "3.00e-04", "0.75", "7.000"):
        assert part in text
    assert "best 7.250 at 400" in text
    assert text.count("●") == 5, "four measurements and the legend"
    assert "It was a dark [bold] night" in text, "not taken for markup"
    assert any("\u2801" <= c <= "\u28ff" for c in text)


def test_held_out_loss_is_not_there_before_it_is_measured() -> None:
    text = "\n".join(frame(80, 30, steps=50))
    assert "not measured yet" in text
    assert "●" not in text


def test_lines_where_there_is_no_terminal(capsys: Any) -> None:
    with training_view("train", sampler=lambda step: "a\nb" if step == 2 else None) as on_step:
        for i in (1, 2, 3):
            on_step(report(i, val_loss=2.5))
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("train: step 2 of 1,000, loss 8.990, held out 2.500, 12,345 tokens/s")
    assert second == "train: step 2 writes: a b"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}])
def test_lines_where_colour_or_cursor_are_not_wanted(
    environment: dict[str, str], monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    console = terminal(80, 24)
    with training_view("train", sampler=lambda step: "x", console=console) as on_step:
        on_step(report(1))
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    assert "step 1 writes: x" in capsys.readouterr().err


def test_the_terminal_is_given_back_when_training_fails(monkeypatch: Any) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    console = terminal(80, 30)

    def fail() -> None:
        with training_view("train", console=console) as on_step:
            on_step(report(1))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.index("\x1b[?1049h") < text.index("\x1b[?1049l"), "the other screen, and back"
    assert text.rindex("\x1b[?25l") < text.rindex("\x1b[?25h"), "the cursor is seen again"
    assert "step 1 of 1,000" in text[text.index("\x1b[?1049l") :], "its last picture stays"


def test_nothing_is_drawn_when_there_was_no_step() -> None:
    console = terminal(80, 30)
    with training_view("train", console=console):
        pass
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 125, 4000)] == ["0 s", "1 m 00 s", "2 m 05 s", "1 h 06 m"]


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_saves_and_leaves_it_clean(text_file: Path, tmp_path: Path) -> None:
    """The command under a pseudo-terminal: a live view, a sample, then Ctrl+C."""
    config = tmp_path / "tiny.toml"
    config.write_text("vocab_size = 300\ncontext_length = 16\nn_layer = 1\nn_head = 2\nn_kv_head = 1\nn_embd = 32\n")
    command = [sys.executable, "-m", "gptedge", "train", "--data", str(text_file), "--out", str(tmp_path / "run")]
    command += ["--config", str(config), "--max-steps", "1000000", "--sample-every", "20", "--sample-prompt", "the cat"]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    environment.pop("NO_COLOR", None)
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    try:
        seen = read_until(ours, b"writes", child)
        child.send_signal(signal.SIGINT)
        seen += read_until(ours, None, child)
        assert child.wait(60) == 130
    finally:
        child.kill()
        os.close(ours)
    after = seen[seen.rindex(b"\x1b[?1049l") :]
    assert b"\x1b[?25h" in seen
    assert b"the cat" in seen
    assert b"nats a token" in after, "the last picture stays"
    assert after.rstrip().endswith(b"gptedge: interrupted")
    assert list((tmp_path / "run" / "state").glob("step-*.pt"))


def read_until(descriptor: int, text: bytes | None, child: subprocess.Popen[bytes]) -> bytes:
    """What a terminal gets until it has shown `text`, or to the end."""
    seen, deadline = b"", time.monotonic() + 120
    while (text is None or text not in seen) and time.monotonic() < deadline:
        try:
            piece = os.read(descriptor, 1 << 16)
        except OSError:  # Linux's way to say that the other side has gone
            break
        if not piece:
            break
        seen += piece
    return seen


def test_the_best_of_a_resumed_run_is_the_whole_runs() -> None:
    """Measured before this session, and told with every step."""
    view = View("train mine")
    view.add(report(120, val_loss=3.3, best_val_loss=1.7, best_step=60))
    shown = io.StringIO()
    Console(file=shown, width=100, height=30).print(view)
    assert "best 1.700 at 60" in shown.getvalue()


def test_samples_command_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with training_view("train mine", sampler=lambda step: "A\x1b[2J\x1b]0;owned\x07B") as on_step:
        on_step(report(1))
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert r"A\u{1b}[2J\u{1b}]0;owned\u{7}B" in said
