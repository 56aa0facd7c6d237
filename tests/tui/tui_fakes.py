"""A model that says what it is told to, with the interface of gptedge.Model and its Chat: no weights, no onnxruntime.

As a program (`python tui_fakes.py plain|app`) it runs the real chats with this model, for tests that need a process.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gptedge.config import SamplingParams
from gptedge.conversation import checked_messages
from gptedge.errors import UsageError
from gptedge.runtime.generate import Chunk, Result, Stream, Timings, Usage


@dataclass
class Turn:
    """What the model does for one question."""

    pieces: Sequence[str]
    error: Exception | None = None
    """Raised before the first piece (`when` "ask") or after the last (`when` "end")."""
    when: str = "end"
    delay: float = 0.0
    gate: threading.Event | None = None
    """Waited for before the piece numbered `gate_at`, unless the reply is cancelled."""
    gate_at: int = 0
    finish: str = "stop"
    dropped_tokens: int = 0


@dataclass
class FakeModel:
    turns: list[Turn]
    """One for each question or regeneration; the last is used again and again."""
    is_continuation: bool = False
    recipe: str = "int4"
    context_length: int = 2048
    asked: list[list[dict[str, str]]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    chats: list[FakeChat] = field(default_factory=list)
    closed: bool = False

    @property
    def bundle(self) -> Any:
        return SimpleNamespace(recipe=self.recipe, path=Path("fake"))

    @property
    def chat_template(self) -> Any:
        return SimpleNamespace(is_continuation=self.is_continuation)

    def chat(self, *, system: str | None = None, params: SamplingParams | None = None) -> FakeChat:
        self.chats.append(FakeChat(self, system, params or SamplingParams()))
        return self.chats[-1]

    def close(self) -> None:
        self.closed = True


class FakeChat:
    def __init__(self, model: FakeModel, system: str | None, params: SamplingParams) -> None:
        self.model, self.params = model, params
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.cached_tokens = 0

    def stream(self, text: str, **changes: Any) -> Stream:
        return self._reply([*self.messages, {"role": "user", "content": text}], changes)

    def regenerate(self, **changes: Any) -> Stream:
        messages = list(self.messages)
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] != "user":
            raise UsageError("there is no question to answer again")
        return self._reply(messages, changes)

    def clear(self) -> None:
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]

    def to_dict(self) -> dict[str, Any]:
        return {"messages": [dict(m) for m in self.messages]}

    def load_dict(self, data: Any) -> None:
        self.messages = checked_messages(data["messages"])

    def _reply(self, messages: list[dict[str, str]], changes: dict[str, Any]) -> Stream:
        model = self.model
        turn = model.turns[min(len(model.asked), len(model.turns) - 1)]
        model.asked.append(messages)
        model.changes.append(changes)
        replace(self.params, **changes)
        if turn.error and turn.when == "ask":
            raise turn.error

        def make(cancelled: threading.Event) -> Iterator[Chunk]:
            return self._chunks(turn, len(messages) * 10, cancelled)

        def end(result: Result | None) -> None:
            if result is not None and result.token_ids:
                self.messages = [*messages, {"role": "assistant", "content": result.text}]

        return Stream(make, end)

    def _chunks(self, turn: Turn, prompt_tokens: int, cancelled: threading.Event) -> Iterator[Chunk]:
        said = 0
        for i, piece in enumerate(turn.pieces):
            if turn.gate is not None and i == turn.gate_at:
                while not (turn.gate.wait(0.005) or cancelled.is_set()):
                    pass
            if cancelled.is_set():
                break
            if turn.delay:
                time.sleep(turn.delay)
            said += 1
            self.cached_tokens = prompt_tokens + said
            yield Chunk(piece, (i + 1,))
        if turn.error:
            raise turn.error
        finish: Any = "cancelled" if said < len(turn.pieces) else turn.finish
        timings = Timings(ttft_ms=120.0, prefill_tokens_per_s=500.0, decode_tokens_per_s=87.4)
        yield Chunk("", finish_reason=finish, usage=Usage(prompt_tokens, said, turn.dropped_tokens), timings=timings)


def _run_real(model: FakeModel, folder: Path) -> None:
    """`gptedge.tui.app.run` itself, in which a handler of ours fails after the first words."""
    import os

    from gptedge.tui import app, colours

    async def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    app.AssistantMessage.append = fail  # type: ignore[method-assign]
    os.environ["GPTEDGE_HOME"] = str(folder)
    sys.modules["gptedge"].load = lambda *_, **__: model  # type: ignore[attr-defined]
    params = SamplingParams()
    app.run(folder, system=None, params=params, loading={}, saved=None, answer=colours.Answer())


def main(how: str, folder: str, pieces: int = 400) -> None:
    """Slow replies of numbered words, so that there is time to interrupt them."""
    model = FakeModel([Turn([f"word{i} " for i in range(int(pieces))], delay=0.02)])
    if how == "crash":
        _run_real(model, Path(folder))
        return
    from gptedge.tui.store import ChatFile

    file = ChatFile.new(Path(folder), "fake")
    if how == "plain":
        from gptedge.tui.plain import Repl

        Repl(model, model.chat(), file).run()  # type: ignore[arg-type]
        return
    from gptedge.tui.app import ChatApp

    load: Callable[[], Any] = lambda: model  # noqa: E731
    app = ChatApp(load, name="fake", file=file)
    ended_by = app.run()
    app.close()
    if ended_by is not None:
        raise ended_by


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
