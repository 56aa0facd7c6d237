"""The asyncio twins: the same answers, and nothing that `Model`, `Chat` and `Stream` can do is missing."""

from __future__ import annotations

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

import gptedge
from gptedge.model import Model

INNER = {
    "bundle",
    "session",
    "tokenizer",
    "threads_from",
    "chat_template",
    "chat_prompt",
    "window",
    "checked_prompt",
    "prefixes",
    "run_list",
}
"""Of a model; through `AsyncModel.model`."""


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return gptedge.load(tiny_bundle, threads=1)


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def test_the_twins_have_the_same_names_and_arguments(model: Model) -> None:
    chat = model.chat()
    twins = [
        (model, gptedge.AsyncModel(model), INNER, {"model", "load"}),
        (chat, gptedge.AsyncChat(chat), set(), {"chat"}),
        (gptedge.Stream, gptedge.AsyncStream, set(), set()),
    ]
    for plain, twin, inner, own in twins:
        assert public(plain) - inner == public(twin) - own
        for name in public(plain) - inner:
            if inspect.isroutine(getattr(plain, name)):
                ours, theirs = (list(inspect.signature(getattr(t, name)).parameters) for t in (plain, twin))
                # what is named here goes through the other's **changes, or is awaited apart
                assert [p for p in ours if p not in ("batch_size", "cache")] == theirs, name


async def test_the_programs_own_threads_are_left_to_it(model: Model) -> None:
    """Where all of them are taken, replies come all the same, and a task that is cancelled ends."""
    loop, taken = asyncio.get_running_loop(), Event()
    with ThreadPoolExecutor(1) as pool:
        loop.set_default_executor(pool)
        held = loop.run_in_executor(None, taken.wait)
        try:
            twin = gptedge.AsyncModel(model)
            async with asyncio.timeout(20):
                assert (await twin.run("The", max_tokens=3)).usage.completion_tokens == 3
                task = asyncio.create_task(twin.run("The", max_tokens=200))
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        finally:
            taken.set()
            await held


async def test_answers_are_those_of_the_model(tiny_bundle: Path, model: gptedge.Model, tmp_path: Path) -> None:
    async with await gptedge.AsyncModel.load(tiny_bundle, threads=1) as twin:
        assert await twin.generate("The", max_tokens=5) == model.generate("The", max_tokens=5)
        assert await twin.generate(["The", "fox"], max_tokens=5) == model.generate(["The", "fox"], max_tokens=5)
        text = [chunk.text async for chunk in twin.stream("The", max_tokens=5)]
        assert "".join(text) == model.generate("The", max_tokens=5)
        async with twin.chat(max_tokens=4).stream("hi") as stream:
            async for _ in stream:
                stream.cancel()
        assert stream.result.finish_reason in ("cancelled", "stop")
        chat = twin.chat(max_tokens=4)
        await chat.send("hi")
        await chat.save_cache(tmp_path / "chat.kv")
        again = twin.chat()
        await again.load_cache(tmp_path / "chat.kv")
        assert again.messages == chat.messages
        with pytest.raises(gptedge.UsageError, match="await its load_cache"):
            twin.chat(cache=tmp_path / "chat.kv")


async def test_what_the_twins_have_beyond_asking(tiny_bundle: Path) -> None:
    model = await gptedge.AsyncModel.load(tiny_bundle, threads=1)
    params = gptedge.SamplingParams(max_tokens=3)
    assert await model.generate("The", params) == (await model.run("The", params)).text
    ids = model.model.tokenizer.encode("The", add_special_tokens=True)
    assert "".join([c.text async for c in model.stream_ids(ids, params)]) == await model.generate("The", params)
    chat = model.chat(system="S", params=params)
    await chat.send("one")
    twin = await chat.fork()
    twin.edit(1, "two")
    async for _ in twin.regenerate():
        pass
    assert [m["content"] for m in twin.messages][:2] == ["S", "two"]
    chat.load_dict(twin.to_dict())
    assert chat.messages == twin.messages
    chat.clear()
    assert chat.messages == twin.messages[:1]
    await model.close()
    with pytest.raises(gptedge.BundleError, match="closed"):
        await model.generate("The")


async def test_what_is_cancelled_stops_and_frees_its_chat(tiny_bundle: Path) -> None:
    """A task that is cancelled in its midst; a loop that is left; a stream that has not begun."""
    async with await gptedge.AsyncModel.load(tiny_bundle, threads=1) as twin:
        chat = twin.chat(max_tokens=250, stop=["never"])
        texts = ["The"] * 50
        for ask in (
            lambda: chat.send("hi"),
            lambda: twin.generate("The", max_tokens=250, seed=1),
            lambda: twin.generate(texts, max_tokens=250, seed=1, batch_size=2),
        ):
            task = asyncio.create_task(ask())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await chat.send("and now", max_tokens=2)).usage.completion_tokens <= 2
        async for _ in chat.stream("more"):
            break
        await chat.send("again", max_tokens=2)
        stream = chat.stream("not yet")
        with pytest.raises(gptedge.UsageError, match="has not begun"):
            print(stream.result)
        stream.cancel()
        (last,) = [chunk async for chunk in stream]
        assert (last.finish_reason, stream.result.token_ids) == ("cancelled", ())
