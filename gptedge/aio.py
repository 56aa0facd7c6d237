"""`gptedge.AsyncModel`: the API of `gptedge.Model` for programs that run an asyncio event loop.

Computing happens in worker threads, where it releases the interpreter's lock; the loop is never blocked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, TypeVar, overload

from gptedge.config import SamplingParams
from gptedge.conversation import Chat
from gptedge.errors import UsageError
from gptedge.loading import load
from gptedge.model import Model
from gptedge.runtime.adapter import Adapter
from gptedge.runtime.generate import Chunk, Result, Stream

T = TypeVar("T")


def _threaded(work: Callable[[], T]) -> asyncio.Future[T]:
    """`work` in a thread of its own: asyncio's few are the program's, and who waits for one of them cannot be told to
    end."""
    done, context = Future[T](), copy_context()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(context.run(work))
        except BaseException as e:
            done.set_exception(e)

    Thread(target=run, name="gptedge", daemon=True).start()
    return asyncio.wrap_future(done)


async def _in_thread(work: Callable[[], T], cancel: Callable[[], None]) -> T:
    """Let a thread work; where the task is cancelled, `cancel` tells it to end, which is waited for."""
    working = _threaded(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        cancel()
        await asyncio.wait([working])
        raise


async def _whole(make: Callable[[], Stream]) -> Result:
    """A reply that is read in one thread from beginning to end."""
    stream = await _threaded(make)
    await _in_thread(lambda: deque(stream, maxlen=0), stream.cancel)
    return stream.result


class AsyncStream:
    """A `Stream` whose chunks are awaited. Leaving the `async with` block, or cancelling the task, cancels it."""

    def __init__(self, make: Callable[[], Stream]) -> None:
        self._make = make
        self._stream: Stream | None = None
        self._is_cancelled = False

    async def __aenter__(self) -> AsyncStream:
        await self._opened()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Chunk:
        stream = await self._opened()
        # None at the end: StopIteration cannot cross a future.
        chunk = await _in_thread(lambda: next(stream, None), stream.cancel)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def __del__(self) -> None:
        """A loop that was left: the thread that read last may hold the stream a moment longer."""
        self.cancel()

    def cancel(self) -> None:
        """As `Stream.cancel`."""
        self._is_cancelled = True
        if self._stream is not None:
            self._stream.cancel()

    async def close(self) -> None:
        """Cancel, and take in what is left, so that `result` is there."""
        self._is_cancelled = True
        if self._stream is not None:
            self._stream.cancel()
            await asyncio.shield(_threaded(self._stream.close))

    @property
    def result(self) -> Result:
        if self._stream is None:
            raise UsageError("this reply has not begun; iterate over it first, or enter it with `async with`")
        return self._stream.result

    async def _opened(self) -> Stream:
        if self._stream is None:
            self._stream = await _threaded(self._make)
            if self._is_cancelled:
                self._stream.cancel()
        return self._stream


class AsyncChat:
    """`Chat`, whose methods are awaited where they compute, or copy or read a KV cache."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    async def send(self, text: str, **changes: Any) -> Result:
        return await _whole(lambda: self.chat.stream(text, **changes))

    def stream(self, text: str, **changes: Any) -> AsyncStream:
        return AsyncStream(lambda: self.chat.stream(text, **changes))

    def regenerate(self, **changes: Any) -> AsyncStream:
        return AsyncStream(lambda: self.chat.regenerate(**changes))

    def edit(self, index: int, text: str) -> None:
        self.chat.edit(index, text)

    async def fork(self) -> AsyncChat:
        return AsyncChat(await _threaded(self.chat.fork))

    def clear(self) -> None:
        self.chat.clear()

    def to_dict(self) -> dict[str, Any]:
        return self.chat.to_dict()

    def load_dict(self, data: Mapping[str, Any]) -> None:
        self.chat.load_dict(data)

    async def save_cache(self, path: str | Path) -> None:
        await _threaded(partial(self.chat.save_cache, path))

    async def load_cache(self, path: str | Path) -> None:
        await _threaded(partial(self.chat.load_cache, path))

    @property
    def messages(self) -> list[dict[str, str]]:
        return self.chat.messages

    @property
    def params(self) -> SamplingParams:
        return self.chat.params

    @property
    def dropped_messages(self) -> int:
        return self.chat.dropped_messages

    @property
    def cached_tokens(self) -> int:
        return self.chat.cached_tokens


class AsyncModel:
    """`Model`, awaited: `async with await AsyncModel.load(path) as model: await model.generate("…")`."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @classmethod
    async def load(cls, bundle: str | Path, **options: Any) -> AsyncModel:
        return cls(await _threaded(partial(load, bundle, **options)))

    @overload
    async def generate(self, prompt: str, params: SamplingParams | None = None, **changes: Any) -> str: ...
    @overload
    async def generate(
        self, prompt: Sequence[str], params: SamplingParams | None = None, **changes: Any
    ) -> list[str]: ...
    async def generate(self, prompt: str | Sequence[str], params: SamplingParams | None = None, **changes: Any) -> Any:
        done = await self.run(prompt, params, **changes)
        return done.text if isinstance(done, Result) else [result.text for result in done]

    @overload
    async def run(self, prompt: str, params: SamplingParams | None = None, **changes: Any) -> Result: ...
    @overload
    async def run(
        self, prompt: Sequence[str], params: SamplingParams | None = None, **changes: Any
    ) -> list[Result]: ...
    async def run(self, prompt: str | Sequence[str], params: SamplingParams | None = None, **changes: Any) -> Any:
        if isinstance(prompt, str):
            return await _whole(lambda: self.model.stream(prompt, params, **changes))
        cancelled = Event()
        return await _in_thread(lambda: self.model.run_list(prompt, params, cancelled, **changes), cancelled.set)

    def stream(self, prompt: str, params: SamplingParams | None = None, **changes: Any) -> AsyncStream:
        return AsyncStream(lambda: self.model.stream(prompt, params, **changes))

    def stream_ids(self, prompt: Sequence[int], params: SamplingParams | None = None, **changes: Any) -> AsyncStream:
        return AsyncStream(lambda: self.model.stream_ids(prompt, params, **changes))

    async def load_adapter(self, path: str | Path) -> Adapter:
        return await _threaded(partial(self.model.load_adapter, path))

    @property
    def adapter(self) -> Adapter | None:
        """What `load_adapter` gave, or None; assign it to use it."""
        return self.model.adapter

    @adapter.setter
    def adapter(self, adapter: Adapter | None) -> None:
        self.model.adapter = adapter

    def chat(self, *, system: str | None = None, params: SamplingParams | None = None, **changes: Any) -> AsyncChat:
        """A new conversation. To go on with one that was saved: `await chat.load_cache(path)`."""
        if "cache" in changes:
            raise UsageError(
                "reading a saved chat takes time; make a chat without cache, and await its load_cache(path)"
            )
        return AsyncChat(self.model.chat(system=system, params=params, **changes))

    @property
    def context_length(self) -> int:
        return self.model.context_length

    async def close(self) -> None:
        await _threaded(self.model.close)

    async def __aenter__(self) -> AsyncModel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
