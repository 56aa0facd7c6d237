"""The desktop example: its threads without a window, and the window where there is a display."""

from __future__ import annotations

import importlib.util
import queue
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

tkinter = pytest.importorskip("tkinter")
FILE = Path(__file__).parents[2] / "examples" / "desktop" / "chat.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("desktop_chat", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def until(events: queue.Queue[Any], *kinds: str) -> list[tuple[str, str]]:
    """Events up to the first of these kinds."""
    got = [events.get(timeout=20)]
    while got[-1][0] not in kinds:
        got.append(events.get(timeout=20))
    return got


def test_it_answers_stops_and_goes_on(program: ModuleType, adapted: Path) -> None:
    events: queue.Queue[Any] = queue.Queue()
    assistant = program.Assistant(str(adapted / "bundle"), events)
    assert until(events, "ready", "broken") == [("ready", "bundle")]
    assistant.ask("over the lazy dog")
    got = until(events, "done", "failed")
    assert got[-1][0] == "done"
    assert "".join(text for kind, text in got if kind == "says")
    assistant.ask("again")
    until(events, "says")
    assistant.stop()
    assert until(events, "done", "failed")[-1][0] == "done"
    assistant.ask("and again")
    assistant.close()


def test_what_goes_wrong_is_an_event(program: ModuleType, tmp_path: Path) -> None:
    events: queue.Queue[Any] = queue.Queue()
    program.Assistant(str(tmp_path / "nowhere"), events)
    kind, text = until(events, "ready", "broken")[-1]
    assert (kind, "nowhere does not exist" in text) == ("broken", True)


def test_the_window_asks_and_shows(program: ModuleType, adapted: Path) -> None:
    try:
        window = program.Window(str(adapted / "bundle"))
    except tkinter.TclError as e:  # what tkinter says where there is no screen; the tests above need none
        pytest.skip(f"no display: {e}")
    try:
        wait(window, lambda: str(window.question["state"]) == "normal")
        window.question.insert(0, "over the lazy dog")
        window.ask()
        assert window.button["text"] == "Stop"
        wait(window, lambda: window.button["text"] == "Ask")
        assert "over the lazy dog" in window.transcript.get("1.0", "end")
        assert len(window.transcript.get("1.0", "end").strip().splitlines()) >= 3
    finally:
        window.close()


def wait(window: Any, condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        window.root.update()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
