"""Contexts that run out: refused, or shifted to what is newest, against a slow oracle that keeps no cache."""

from __future__ import annotations

from pathlib import Path

import pytest

import gptedge
from gptedge.runtime.context import PlainText, Window
from tests.runtime.test_session import CACHES

CONTEXT = 300  # of the tiny model


@pytest.fixture(scope="module", params=CACHES)
def model(request: pytest.FixtureRequest) -> gptedge.Model:
    return gptedge.load(request.getfixturevalue(CACHES[request.param]), threads=1)


def endless(model: gptedge.Model, **changes: object) -> dict[str, object]:
    return {"context_overflow": "shift", "logit_bias": dict.fromkeys(model.bundle.eos_ids, -1e4), **changes}


def naive(model: gptedge.Model, ids: list[int], n: int, keep: int) -> tuple[list[int], int]:
    """Greedy tokens, each from the whole text, which is cut to half the context when no token more fits; tokens cut."""
    out: list[int] = []
    dropped = 0
    for _ in range(n):
        if len(ids) >= CONTEXT:
            dropped += len(ids) - CONTEXT // 2
            ids = ids[:keep] + ids[-(CONTEXT // 2 - keep) :]
        logits = model.session.run(ids, model.session.new_cache())[0].copy()
        logits[list(model.bundle.eos_ids)] -= 1e4
        out.append(int(logits.argmax()))
        ids = [*ids, out[-1]]
    return out, dropped


@pytest.mark.parametrize(("length", "keep"), [(200, 0), (299, 1), (300, 0), (700, 1)])
def test_text_goes_on_without_its_oldest_tokens(model: gptedge.Model, length: int, keep: int) -> None:
    ids = [5 + i % 200 for i in range(length)]
    ids[0] = model.tokenizer.bos_id if keep else 7
    with model.stream_ids(ids, **endless(model, max_tokens=155)) as stream:
        list(stream)
    result = stream.result
    assert (list(result.token_ids), result.usage.dropped_tokens) == naive(model, ids, 155, keep)
    assert result.finish_reason == "length"
    assert result.usage.prompt_tokens == (length if length < CONTEXT else CONTEXT // 2)


def test_what_fits_is_as_ever(model: gptedge.Model) -> None:
    plain = model.run("The quick", max_tokens=30)
    shifted = model.run("The quick", max_tokens=30, context_overflow="shift")
    assert (shifted.token_ids, shifted.usage) == (plain.token_ids, plain.usage)
    assert plain.usage.dropped_tokens == 0


def test_without_shift_nothing_is_left_out(model: gptedge.Model) -> None:
    with pytest.raises(gptedge.ContextOverflowError, match="context_overflow shift"):
        model.stream_ids([5] * 300)
    with model.stream_ids([5] * 290, **endless(model, max_tokens=50, context_overflow="error")) as stream:
        list(stream)
    assert (stream.result.finish_reason, len(stream.result.token_ids)) == ("length", 10)
    with pytest.raises(gptedge.UsageError, match="context_overflow is 'ignore'; it must be error or shift"):
        model.stream("a", context_overflow="ignore")


def test_cancelled_between_two_shifts(model: gptedge.Model) -> None:
    stream = model.stream_ids([5] * 100, **endless(model, max_tokens=10_000))
    for i, _ in enumerate(stream):
        if i == 500:
            stream.cancel()
    assert (stream.result.finish_reason, len(stream.result.token_ids)) == ("cancelled", 501)


def test_seed_and_penalties_go_on_through_a_shift(model: gptedge.Model) -> None:
    """A sampler begun anew would draw the same random numbers again, and forget what it has counted."""
    ids, params = [5] * 250, endless(model, temperature=1.0, seed=3, max_tokens=100)
    with model.stream_ids(ids, **params, presence_penalty=100.0) as stream:
        list(stream)
    assert len(set(stream.result.token_ids)) == 100


# ---- chats ---------------------------------------------------------------------------------------------------------


def filled(model: gptedge.Model, turns: int = 8) -> gptedge.Chat:
    """Turns of about 37 tokens, of which the context holds seven."""
    chat = model.chat(system="Be brief.", **endless(model, max_tokens=12))
    for i in range(turns):
        chat.send(f"Question {i}: the quick brown fox?")
    return chat


def test_oldest_turns_go_and_the_system_message_stays(model: gptedge.Model) -> None:
    chat = filled(model, 0)
    results = [chat.send(f"Question {i}: the quick brown fox?") for i in range(12)]
    dropped = [r.usage.dropped_tokens for r in results]
    assert 1 <= sum(d > 0 for d in dropped) <= 3  # half the context at once, not a turn at a time
    assert len(chat.messages) == 25
    assert chat.dropped_messages % 2 == 0
    assert chat.dropped_messages > 0
    kept = [chat.messages[0], *chat.messages[1 + chat.dropped_messages :]]
    fresh = model.chat(params=chat.params)
    fresh.load_dict({"messages": kept[:-2]})
    assert fresh.send(kept[-2]["content"]).usage.prompt_tokens < CONTEXT
    again = [r.timings.cached_tokens for r, d in zip(results[1:], dropped[1:], strict=True) if not d]
    assert min(again) > 20  # turns between two shifts run only what is new


def test_shifted_prompt_is_that_of_the_messages_kept(model: gptedge.Model) -> None:
    chat = filled(model)
    while True:
        result = chat.send("And then?", max_tokens=5)
        if result.usage.dropped_tokens and result.usage.prompt_tokens <= CONTEXT // 2:
            break  # the prompt was shifted, and not the reply when it reached the end
    fresh = model.chat(params=chat.params)
    fresh.load_dict({"messages": [chat.messages[0], *chat.messages[1 + chat.dropped_messages : -2]]})
    expected = fresh.send("And then?", max_tokens=5)
    assert result.token_ids == expected.token_ids
    assert result.usage.prompt_tokens == expected.usage.prompt_tokens
    assert CONTEXT // 2 - 45 < result.usage.prompt_tokens <= CONTEXT // 2  # no more turns went than had to


def test_reply_that_fills_the_context_drops_turns_and_goes_on(model: gptedge.Model) -> None:
    chat = filled(model, 4)
    result = chat.send("Go on and on.", max_tokens=200)
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 200
    assert result.usage.dropped_tokens > 0
    assert chat.dropped_messages > 0
    following = chat.send("More?", max_tokens=3)
    assert following.timings.cached_tokens > 200 or following.usage.dropped_tokens


def test_reply_alone_longer_than_the_context_ends_there(model: gptedge.Model) -> None:
    chat = filled(model, 2)
    result = chat.send("Go on and on.", max_tokens=2000)
    assert result.finish_reason == "length"
    assert 200 < len(result.token_ids) < CONTEXT


def test_shifting_is_advised_where_older_turns_would_make_room(model: gptedge.Model) -> None:
    chat = filled(model, 12)
    with pytest.raises(gptedge.ContextOverflowError, match=r"or let the oldest go with context_overflow shift$"):
        chat.send("And then?", context_overflow="error")
    chat.send("And then?", max_tokens=2)


def test_question_alone_longer_than_the_context(model: gptedge.Model) -> None:
    chat = filled(model, 2)
    before = list(chat.messages)
    for overflow in ("shift", "error"):  # neither of which has room for it
        with pytest.raises(gptedge.ContextOverflowError, match=r"context holds 300, .*; shorten the prompt$"):
            chat.send("word " * 1000, context_overflow=overflow)
    assert chat.messages == before
    chat.send("still here")


def test_what_was_dropped_comes_back_when_there_is_room(model: gptedge.Model) -> None:
    chat = filled(model, 10)
    assert chat.dropped_messages
    twin = chat.fork()
    assert twin.dropped_messages == chat.dropped_messages
    twin.edit(1, "Question 0 again?")
    assert twin.dropped_messages == 0
    chat.clear()
    assert chat.dropped_messages == 0


def test_shifted_chat_from_disk(model: gptedge.Model, tmp_path: Path) -> None:
    chat = filled(model, 10)
    chat.save_cache(tmp_path / "chat.kv")
    again = model.chat(cache=tmp_path / "chat.kv", params=chat.params)
    assert again.dropped_messages == chat.dropped_messages
    kept, reopened = chat.send("And?"), again.send("And?")
    assert (kept.token_ids, kept.timings.cached_tokens) == (reopened.token_ids, reopened.timings.cached_tokens)


def test_windows() -> None:
    text = PlainText(range(10), keep=2)
    assert text.shorten([], 5) == [0, 1, 7, 8, 9]
    assert text.shorten([10, 11], 5) == [0, 1, 9, 10, 11]
    assert text.shorten([], 10) is None
    assert PlainText([1, 2], keep=1).shorten([], 1) is None
    window = Window(range(10), 10, text)
    assert (window.ids, window.dropped, window.room) == ([0, 1, 7, 8, 9], 5, 5)
    assert window.shift([10, 11, 12, 13, 14])
    assert (window.ids, window.dropped) == ([0, 1, 12, 13, 14], 10)
    assert not Window(range(10), 10, None).shift([1])
