"""An app with a fake model, driven through Textual's pilot."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tui_fakes import FakeModel

Until = Callable[[Callable[[], Any]], Any]


class Driver:
    """The app, its pilot, and how to wait for what a thread brings about."""

    def __init__(self, app: Any, pilot: Any) -> None:
        self.app, self.pilot = app, pilot

    async def until(self, condition: Callable[[], Any], seconds: float = 8.0) -> None:
        steps = int(seconds / 0.02)
        for _ in range(steps):
            if condition():
                await self.pilot.pause()
                return
            await self.pilot.pause(0.02)
        raise AssertionError(f"not within {seconds} s: {condition.__code__.co_names}")

    async def ready(self) -> None:
        await self.until(lambda: self.app.chat is not None)

    async def send(self, text: str, *, wait: bool = True) -> None:
        self.app.composer.insert(text)
        await self.pilot.press("enter")
        if wait:
            await self.idle()

    async def idle(self) -> None:
        await self.until(lambda: self.app.reply is None and not any(r.is_streaming for r in self.replies))
        await self.pilot.pause(0.05)

    @property
    def replies(self) -> list[Any]:
        from gptedge.tui.transcript import AssistantMessage

        return [m for m in self.app.transcript.query(AssistantMessage) if m.display]

    @property
    def screen(self) -> str:
        """What is on the screen, as text."""
        return "\n".join(
            "".join(segment.text for segment in line) for line in self.app.screen._compositor.render_strips()
        )


@pytest.fixture
def drive(tmp_path: Path) -> Callable[..., Any]:
    """`async with drive(model) as d`: a running app; its threads are joined at the end."""

    @asynccontextmanager
    async def start(model: FakeModel, *, size: tuple[int, int] = (80, 24), **options: Any) -> AsyncIterator[Driver]:
        from gptedge.tui.app import ChatApp
        from gptedge.tui.store import ChatFile

        options.setdefault("load", lambda: model)
        options.setdefault("file", ChatFile.new(tmp_path / "chats", "fake"))
        app = ChatApp(options.pop("load"), name="fake-model", **options)
        try:
            async with app.run_test(size=size) as pilot:
                yield Driver(app, pilot)
        finally:
            app.close()

    return start
