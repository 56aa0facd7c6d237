"""`gptedge.AsyncModel`: the API of `gptedge.Model` for programs that run an asyncio event loop.

Computing happens in worker threads, where it releases the interpreter's lock; the loop is never blocked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from gptedge.conversation import Chat
from gptedge.loading import load
from gptedge.model import Model
from gptedge.runtime.adapter import Adapter
from gptedge.runtime.generate import Chunk, Result, Stream


def _next(stream: Stream) -> Chunk | None:
    """The next chunk, or None at the end: StopIteration cannot cross a future."""
    return next(stream, None)


class AsyncStream:
    """A `Stream` whose chunks are awaited. Leaving the `async with` block, or cancelling the task, cancels it."""

    def __init__(self, make: Callable[[], Stream]) -> None:
        self._make = make
        self._stream: Stream | None = None

    async def __aenter__(self) -> AsyncStream:
        self._stream = await asyncio.to_thread(self._make)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.cancel()
            await asyncio.shield(asyncio.to_thread(self._stream.close))

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        if self._stream is None:
            async with self:
                async for chunk in self:
                    yield chunk
            return
        while (part := await asyncio.to_thread(_next, self._stream)) is not None:
            yield part

    def cancel(self) -> None:
        """As `Stream.cancel`."""
        self._open.cancel()

    @property
    def result(self) -> Result:
        return self._open.result

    @property
    def _open(self) -> Stream:
        if self._stream is None:
            raise RuntimeError("iterate over this stream, or enter it with `async with`, first")
        return self._stream


class AsyncChat:
    """`Chat`, awaited."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    async def send(self, text: str, **changes: Any) -> Result:
        return await asyncio.to_thread(self.chat.send, text, **changes)

    def stream(self, text: str, **changes: Any) -> AsyncStream:
        return AsyncStream(lambda: self.chat.stream(text, **changes))

    async def save_cache(self, path: str | Path) -> None:
        await asyncio.to_thread(self.chat.save_cache, path)

    async def load_cache(self, path: str | Path) -> None:
        await asyncio.to_thread(self.chat.load_cache, path)


class AsyncModel:
    """`Model`, awaited: `async with await AsyncModel.load(path) as model: await model.generate("…")`."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @classmethod
    async def load(cls, bundle: str | Path, **options: Any) -> AsyncModel:
        return cls(await asyncio.to_thread(load, bundle, **options))

    @overload
    async def generate(self, prompt: str, **changes: Any) -> str: ...
    @overload
    async def generate(self, prompt: Sequence[str], **changes: Any) -> list[str]: ...
    async def generate(self, prompt: str | Sequence[str], **changes: Any) -> Any:
        return await asyncio.to_thread(lambda: self.model.generate(prompt, **changes))

    @overload
    async def run(self, prompt: str, **changes: Any) -> Result: ...
    @overload
    async def run(self, prompt: Sequence[str], **changes: Any) -> list[Result]: ...
    async def run(self, prompt: str | Sequence[str], **changes: Any) -> Any:
        return await asyncio.to_thread(lambda: self.model.run(prompt, **changes))

    def stream(self, prompt: str, **changes: Any) -> AsyncStream:
        return AsyncStream(lambda: self.model.stream(prompt, **changes))

    async def load_adapter(self, path: str | Path) -> Adapter:
        return await asyncio.to_thread(self.model.load_adapter, path)

    @property
    def adapter(self) -> Adapter | None:
        """What `load_adapter` gave, or None; assign it to use it."""
        return self.model.adapter

    @adapter.setter
    def adapter(self, adapter: Adapter | None) -> None:
        self.model.adapter = adapter

    def chat(self, *, system: str | None = None, **changes: Any) -> AsyncChat:
        return AsyncChat(self.model.chat(system=system, **changes))

    async def __aenter__(self) -> AsyncModel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.model.close)
