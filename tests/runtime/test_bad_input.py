"""Misuse: each has one clear error or a defined result; nothing hangs, and nothing is left behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import gptedge
from tests.conftest import make_tokenizer, random_weights, tiny_config

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> gptedge.Model:
    return gptedge.load(tiny_bundle, threads=1)


def endless(model: gptedge.Model, **changes: object) -> dict[str, object]:
    return {"logit_bias": dict.fromkeys(model.bundle.eos_ids, -1e4), "max_tokens": 250, **changes}


def test_prompt_of_a_million_tokens(model: gptedge.Model) -> None:
    with pytest.raises(gptedge.ContextOverflowError, match=r"the prompt has 1000000 tokens and .* holds 300"):
        model.stream_ids([5] * 1_000_000)
    with model.stream_ids([5] * 1_000_000, max_tokens=3, context_overflow="shift") as stream:
        list(stream)
    assert stream.result.usage.dropped_tokens == 1_000_000 - 150


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory that is resident")
def test_context_of_a_million_tokens_takes_memory_only_when_used(tmp_path: Path) -> None:
    import json

    from gptedge.checkpoint import TOKENIZER, write_checkpoint
    from gptedge.export.exporter import export

    tokenizer = make_tokenizer()
    config = tiny_config(tokenizer.vocab_size, n_layer=1, context_length=1_000_000)
    (tmp_path / "c").mkdir()
    write_checkpoint(
        tmp_path / "c", config, random_weights(config), {TOKENIZER: json.dumps(tokenizer.to_dict()).encode()}
    )
    with gptedge.load(export(tmp_path / "c", tmp_path / "b", verify=False).bundle, threads=1) as model:
        assert model.context_length == 1_000_000
        before = resident_mb()
        stream = model.stream("The quick", max_tokens=2**31 - 1)
        for _ in range(400):
            next(stream)
        stream.close()
        model.run(["The", "quick"], max_tokens=300)
        assert resident_mb() - before < 20  # a whole cache would be 256 MB


def test_empty_prompt_without_a_token_to_begin_with(model: gptedge.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.tokenizer), "bos_id", None)
    for ask in (lambda: model.stream(""), lambda: model.run(["a", ""]), lambda: model.stream_ids([])):
        with pytest.raises(gptedge.UsageError, match="the prompt is empty"):
            ask()


@pytest.mark.parametrize(
    "misuse",
    [
        lambda m: m.generate(5),
        lambda m: m.generate(None),
        lambda m: m.generate([None]),
        lambda m: m.generate(b"abc"),
        lambda m: m.run(["a", 3]),
        lambda m: m.stream(None),
        lambda m: m.run("a", {"max_tokens": 2}),
        lambda m: m.stream_ids([1.7]),
        lambda m: m.stream_ids(["a"]),
        lambda m: m.stream_ids(5),
        lambda m: m.chat(system=3),
        lambda m: m.chat().send(None),
        lambda m: m.chat(system="S").edit(0, None),
        lambda m: m.chat(system="S").edit("0", "x"),
        lambda m: m.chat().load_dict(None),
        lambda m: m.chat().load_dict([]),
    ],
)
def test_arguments_of_other_types(model: gptedge.Model, misuse: Callable[[gptedge.Model], object]) -> None:
    with pytest.raises(
        gptedge.GptEdgeError, match=r"it must be|whole numbers|must have messages|there is no message '0'"
    ):
        misuse(model)


def test_chat_cancelled_before_its_first_token(model: gptedge.Model) -> None:
    chat = model.chat(system="S")
    with chat.stream("Hi") as stream:
        stream.cancel()
        assert [c.finish_reason for c in stream] == ["cancelled"]
    assert chat.messages == [{"role": "system", "content": "S"}]
    assert chat.send("Hi", max_tokens=2).usage.completion_tokens <= 2


def test_cancel_again_and_after_the_end(model: gptedge.Model) -> None:
    with model.stream("The", max_tokens=2) as stream:
        list(stream)
    for _ in range(3):
        stream.cancel()
        stream.close()
    assert stream.result.finish_reason in ("length", "stop")
    assert list(stream) == []


def test_threads_that_share_a_chat(model: gptedge.Model) -> None:
    """One asks at a time; the others are told, and the history is that of those who were answered."""
    chat = model.chat(max_tokens=20)
    told, answered = [], []
    start = threading.Barrier(6)

    def ask(i: int) -> None:
        start.wait()
        for n in range(5):
            try:
                chat.send(f"{i} {n}")
                answered.append(f"{i} {n}")
            except gptedge.UsageError as e:
                told.append(str(e))
            except gptedge.ContextOverflowError:
                return

    run_all([lambda i=i: ask(i) for i in range(6)])
    assert answered
    assert all("already answering" in t or "ask again" in t for t in told)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * len(answered)
    assert sorted(m["content"] for m in chat.messages[::2]) == sorted(answered)
    twin = model.chat(max_tokens=3)
    twin.load_dict(chat.to_dict())


def test_reply_to_a_chat_that_has_gone_on_is_refused(model: gptedge.Model) -> None:
    """Otherwise it would take the place of the turn that came between."""
    chat = model.chat(**endless(model, max_tokens=2))
    first, second = chat.stream("first"), chat.stream("second")
    list(second)
    with pytest.raises(gptedge.UsageError, match=r"gone on since .* ask again"):
        list(first)
    assert [m["content"] for m in chat.messages] == ["second", second.result.text]
    again = chat.regenerate()
    chat.edit(0, "third")
    with pytest.raises(gptedge.UsageError, match="gone on since"):
        list(again)
    list(chat.regenerate())
    assert [m["content"] for m in chat.messages][::2] == ["third"]


def test_history_stays_as_it_is_during_a_reply(model: gptedge.Model) -> None:
    chat = model.chat(system="S", **endless(model, max_tokens=4))
    chat.send("one")
    stream = chat.stream("two")
    next(stream)
    for change in (lambda: chat.edit(1, "x"), chat.clear, lambda: chat.load_dict({"messages": []}), chat.fork):
        with pytest.raises(gptedge.UsageError, match="already answering"):
            change()
    list(stream)
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["one", "two"]


def test_threads_that_share_a_stream(model: gptedge.Model) -> None:
    """Each chunk goes to one of them, and closing waits for the chunk under way."""
    stream = model.stream("The", **endless(model))
    got: list[gptedge.Chunk] = []
    run_all([lambda: got.extend(stream)] * 4)
    assert sum(len(c.token_ids) for c in got) == 250
    assert [c.finish_reason for c in got if c.finish_reason] == ["length"]
    other = model.stream("The", **endless(model))
    next(other)
    run_all([lambda: list(other), other.close, other.close])
    assert other.result.finish_reason in ("cancelled", "length")


def test_abandoned_stream_frees_its_chat(model: gptedge.Model) -> None:
    """At once, and its reply stays as far as it came: what is left of it is no cycle for the collector to find."""
    chat = model.chat(max_tokens=40, temperature=0)
    gc.disable()
    try:
        for _ in chat.stream("hi"):
            break
        assert len(chat.messages) == 2
        chat.send("and now", max_tokens=2)
    finally:
        gc.enable()
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_cancelled_stream_that_nobody_reads_frees_its_chat(model: gptedge.Model) -> None:
    """Its last chunk can still be read, and its result is there."""
    chat = model.chat(max_tokens=40, temperature=0)
    stream = chat.stream("hi")
    first = next(stream)
    stream.cancel()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.token_ids == first.token_ids
    chat.send("and now", max_tokens=2)
    (last,) = stream
    assert last.finish_reason == "cancelled"
    unread = chat.stream("more")
    unread.cancel()
    assert unread.result.usage.completion_tokens == 0
    assert unread.result.timings.prefill_tokens_per_s == 0
    chat.clear()


def test_closing_while_others_generate(tiny_bundle: Path) -> None:
    model = gptedge.load(tiny_bundle, threads=1)
    chat, errors, begun = model.chat(**endless(model)), [], threading.Barrier(4)

    def work(generate: Callable[[], object]) -> None:
        begun.wait()
        try:
            while True:
                generate()
        except gptedge.BundleError as e:
            errors.append(str(e))

    def close() -> None:
        begun.wait()
        threading.Event().wait(0.05)
        model.close()

    settings = endless(model, max_tokens=40)
    run_all(
        [
            lambda: work(lambda: model.run("The", **settings)),
            lambda: work(lambda: model.run(["The", "fox"], **settings)),
            lambda: work(lambda: (chat.clear(), chat.send("Hi"))),
            close,
        ]
    )
    assert errors == ["this model has been closed; load it again"] * 3
    model.close()
    with pytest.raises(gptedge.BundleError, match="closed"):
        model.run("The")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory that is resident")
def test_hundreds_of_chats_leave_nothing_behind(model: gptedge.Model, tmp_path: Path) -> None:
    def talk(n: int) -> None:
        for i in range(n):
            chat = model.chat(max_tokens=2, temperature=1.0)
            chat.send(f"Question {i}?")
            twin = chat.fork()
            next(twin.stream("abandoned"))
            if i % 10 == 0:
                chat.save_cache(tmp_path / "chat.kv")
                model.chat(cache=tmp_path / "chat.kv")

    talk(60)
    before = resident_mb()
    talk(240)
    assert resident_mb() - before < 4  # caches of 240 chats and their forks would be 47 MB


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def run_all(works: list[Callable[[], object]]) -> None:
    """Each in a thread; what one raises is raised here."""
    raised: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as e:
            raised.append(e)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
        assert not t.is_alive()
    if raised:
        raise raised[0]
