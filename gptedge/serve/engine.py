"""Replies computed in worker threads and read on the event loop.

    start(window) ─▶ waits for one of `slots` threads ─▶ borrows a KV cache ─▶ chunks … ─▶ async for chunk in reply

Running replies share the model, whose lock lets them take turns. A worker never waits for a client: what a slow one has
not read stays in the reply's queue, so that it holds no slot. Methods are for the event loop's thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from gptedge.config import SamplingParams
from gptedge.errors import UsageError
from gptedge.model import Model
from gptedge.runtime.adapter import Adapter
from gptedge.runtime.context import Window
from gptedge.runtime.generate import Chunk, chunks
from gptedge.serve.cache_pool import CachePool
from gptedge.serve.errors import busy, closing


class Reply:
    """One reply under way: iterate over its chunks once.

    The last chunk has a finish_reason; a reply that is cancelled while it waits has no chunks.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()
        self._future: Future[None] | None = None
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop after the token that is being computed; a reply that still waits ends at once."""
        self.cancelled.set()
        if self._future is not None:
            self._future.cancel()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while (item := await self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def follow(self, future: Future[None]) -> None:
        """Pass on how the work ends: None, or what it raised."""
        self._future = future
        future.add_done_callback(lambda done: self.put(None if done.cancelled() else done.exception()))

    def put(self, item: Chunk | BaseException | None) -> None:
        self.soon(self._queue.put_nowait, item)

    def soon(self, call: Callable[..., object], *arguments: object) -> None:
        """On the loop, from any thread; nobody listens any more once it is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)


def load_variants(model: Model, adapters: Iterable[Path]) -> dict[str, Adapter | None]:
    """What clients may ask for by name: first the model as it is, by its bundle's folder, then it with each adapter."""
    variants: dict[str, Adapter | None] = {model.bundle.path.resolve().name: None}
    for path in adapters:
        if path.stem in variants:
            raise UsageError(f"adapter {path} would be served as {path.stem!r}, as another is; rename one of them")
        variants[path.stem] = model.load_adapter(path)
    return variants


class Engine:
    def __init__(self, model: Model, *, slots: int, max_waiting: int, variants: Mapping[str, Adapter | None]) -> None:
        self.model, self.variants = model, variants
        self.closing = False
        self._limit = slots + max_waiting
        self._max_waiting = max_waiting
        self._pool = CachePool(model.session.new_cache, slots)
        self._workers = ThreadPoolExecutor(slots, "gptedge-serve")
        self._active: dict[Future[None], Reply] = {}

    def check_open(self) -> None:
        """Raise the ApiError of a server that takes no further request now."""
        if self.closing:
            raise closing()
        if sum(not future.done() for future in self._active) >= self._limit:
            raise busy(self._max_waiting)

    def start(self, window: Window, params: SamplingParams, variant: str) -> Reply:
        """Queue a reply of one of the `variants` to what `Model.window` gave."""
        self.check_open()
        reply = Reply()
        future = self._workers.submit(self._work, reply, window, params, self.variants[variant])
        self._active[future] = reply
        reply.follow(future)
        # What a reply raised holds on to all that it was computed with.
        future.add_done_callback(lambda done: reply.soon(self._active.pop, done, None))
        return reply

    def _work(self, reply: Reply, window: Window, params: SamplingParams, adapter: Adapter | None) -> None:
        model = self.model
        with self._pool.borrow(window.ids, adapter) as cache:
            for chunk in chunks(model.session, model.tokenizer, cache, window, params, reply.cancelled):
                reply.put(chunk)

    def close(self) -> None:
        """Refuse further requests and cancel the replies under way. Returns at once."""
        self.closing = True
        for reply in self._active.values():
            reply.cancel()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait, after `close`, until no worker uses the model. From any thread."""
        self._workers.shutdown(wait=True)
