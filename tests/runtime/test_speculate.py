"""Guessing changes no token: with and without it, replies are the same to the last bit; and guesses are sensible."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptedge.bundle import open_bundle
from gptedge.config import SamplingParams
from gptedge.runtime.generate import steps
from gptedge.runtime.session import Session
from gptedge.runtime.speculate import LONGEST, PromptLookup
from tests.conftest import prepared_prompts

PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.7, "top_p": 0.9},
    "penalties": {"temperature": 0.5, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "logprobs": {"temperature": 0, "logprobs": 3},
}


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many tokens each guess had, and how many were right."""
    seen: list[tuple[int, int]] = []
    guessed: list[int] = []
    guess, learn = PromptLookup.guess, PromptLookup.learn

    def note_guess(self: PromptLookup, room: int) -> list[int]:
        guessed[:] = guess(self, room)
        return list(guessed)

    def note(self: PromptLookup, right: int) -> None:
        seen.append((len(guessed), right))
        learn(self, right)

    monkeypatch.setattr(PromptLookup, "guess", note_guess)
    monkeypatch.setattr(PromptLookup, "learn", note)
    return seen


def reply(session: Session, prompt: list[int], max_tokens: int, **settings: Any) -> tuple[list, list[int], np.ndarray]:
    """What `steps` gives; then the tokens in the cache, and its keys and values."""
    cache = session.new_cache()
    params = SamplingParams(max_tokens=max_tokens, seed=5, **settings)
    got = list(steps(session, cache, prompt, params, threading.Event()))
    return got, list(cache.ids), np.concatenate([b.numpy()[:, :, : len(cache)] for b in cache.buffers])


@pytest.mark.parametrize("name", PARAMS)
def test_the_same_tokens_to_the_last_bit(quantized_bundle: Path, name: str, learned: list[tuple[int, int]]) -> None:
    """Of a random model, whose replies fall into loops; over 4 recipes x 4 settings x 25 prompts."""
    bundle = open_bundle(quantized_bundle)
    fast, slow = Session(bundle, threads=1), Session(bundle, threads=1, speculate=False)
    for prompt in prepared_prompts(fast.vocab_size, 25):
        got, wanted = (reply(session, prompt, 48, **PARAMS[name]) for session in (fast, slow))
        assert got[:2] == wanted[:2]
        np.testing.assert_array_equal(got[2], wanted[2])
    assert fast.speculates, "several rows do not agree with two on this processor"
    assert any(right == guessed > 3 for guessed, right in learned) or name != "greedy"
    assert any(right < guessed for guessed, right in learned)


def test_over_an_int8_cache(small_cache_bundle: Path, learned: list[tuple[int, int]]) -> None:
    bundle = open_bundle(small_cache_bundle)
    fast, slow = Session(bundle, threads=1), Session(bundle, threads=1, speculate=False)
    for prompt in prepared_prompts(fast.vocab_size, 25):
        got, wanted = (reply(session, prompt, 48, temperature=0) for session in (fast, slow))
        assert got[:2] == wanted[:2]
        np.testing.assert_array_equal(got[2], wanted[2])
    assert got[2].dtype == np.int8
    assert any(right == guessed > 3 for guessed, right in learned)


def test_float_models_too(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    fast, slow = Session(bundle, threads=1), Session(bundle, threads=1, speculate=False)
    for prompt in prepared_prompts(fast.vocab_size, 10):
        assert reply(fast, prompt, 48, temperature=0)[0] == reply(slow, prompt, 48, temperature=0)[0]


def test_up_to_the_contexts_end(tiny_bundle: Path) -> None:
    session = Session(open_bundle(tiny_bundle), threads=1)
    prompt = prepared_prompts(session.vocab_size, 1)[0] * 20
    left = session.context_length - 40
    got, ids, _ = reply(session, prompt[:40], left, temperature=0)
    assert len(got) == left
    assert len(ids) == session.context_length - 1


@pytest.mark.parametrize("wanted", [1, 2, 7, 20])
def test_stopping_anywhere_leaves_the_tokens_before_the_last(tiny_bundle: Path, wanted: int) -> None:
    """By the caller, who closes it, and by cancelling."""
    session = Session(open_bundle(tiny_bundle), threads=1)
    prompt = prepared_prompts(session.vocab_size, 1)[0]
    all_tokens = [token for token, _ in reply(session, prompt, 48, temperature=0)[0]]
    for cancels in (False, True):
        cache, cancelled = session.new_cache(), threading.Event()
        stream: Iterator = steps(session, cache, prompt, SamplingParams(max_tokens=48, temperature=0), cancelled)
        got = [next(stream)[0] for _ in range(wanted)]
        if cancels:
            cancelled.set()
            assert list(stream) == []
        else:
            stream.close()  # type: ignore[attr-defined]
        assert got == all_tokens[:wanted]
        assert cache.ids == [*prompt, *got[:-1]]


def test_kernels_that_disagree_end_the_guessing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(tiny_bundle)
    fast, slow = Session(bundle, threads=1), Session(bundle, threads=1, speculate=False)
    run = Session.run

    def noisy(self: Session, ids: Any, cache: Any, *, every_row: bool = False) -> Any:
        return run(self, ids, cache, every_row=every_row) * np.float32(1 + 1e-6 * (len(ids) > 2))

    prompt = prepared_prompts(fast.vocab_size, 1)[0]
    wanted = reply(slow, prompt, 48, temperature=0)
    monkeypatch.setattr(Session, "run", noisy)
    assert reply(fast, prompt, 48, temperature=0)[0] == wanted[0]
    assert not fast.speculates


def test_guesses_go_on_as_the_text_did() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 9, 1, 2, 3])
    assert lookup.guess(10) == [4, 5, 6]
    assert lookup.guess(2) == [4, 5]
    assert lookup.guess(0) == lookup.guess(-1) == []
    lookup.append(7)
    assert lookup.guess(10) == []
    for token in (1, 2, 3):
        lookup.append(token)
    assert lookup.guess(10) == [7, 1, 2]  # the latest time


def test_a_loop_goes_on_as_long_as_it_was_one() -> None:
    loop, at = [8, 9] * 99, 8
    lookup = PromptLookup(loop[:at])
    for length in (6, 13, 27, LONGEST, LONGEST):
        assert lookup.guess(100) == loop[at : at + length]
        for token in loop[at : at + length + 1]:
            lookup.append(token)
        at += length + 1


def test_bad_guesses_make_it_careful_and_good_ones_bold() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 1, 2])
    assert lookup.guess(9) == []  # two alike are too few at first
    for token in (3, 4):
        lookup.append(token)
        assert lookup.guess(9)[0] == token + 1
        lookup.learn(0)
    assert lookup.guess(9) == []  # four alike are too few now
    lookup.append(5)
    lookup.learn(0)
    assert lookup.guess(9) == [6, 7, 8, 1, 2]  # but five always do
    lookup = PromptLookup([1, 2, 3, 4, 1, 2])
    lookup.learn(1)
    assert lookup.guess(9) == [3, 4, 1]  # two are enough after a right guess


SOURCE = list(range(100, 140))
COPIED = SOURCE[:10]


@pytest.mark.parametrize(
    ("departure", "back"),
    [
        pytest.param([], 12, id="left out"),
        pytest.param([1], 10, id="put in"),
        pytest.param([1, 2, 3], 10, id="several put in"),
        pytest.param([1], 11, id="replaced"),
        pytest.param([1, 2], 14, id="several replaced"),
    ],
)
def test_a_copy_that_departs_is_taken_up_at_its_first_token_back(departure: list[int], back: int) -> None:
    lookup = PromptLookup([*SOURCE, 0, *COPIED])
    assert lookup.guess(31) == SOURCE[10:20]
    for token in departure:
        lookup.append(token)
        assert lookup.guess(31) == []
    lookup.append(SOURCE[back])
    assert lookup.guess(31) == SOURCE[back + 1 : back + 4]


def test_a_copy_is_taken_up_again_and_again() -> None:
    lookup, guessed = PromptLookup([*SOURCE, 0, *COPIED]), 0
    for at in range(10, 30, 6):  # each sixth token replaced
        for token in (1, *SOURCE[at + 1 : at + 6]):
            guessed += lookup.guess(1) == [token]
            lookup.append(token)
    assert guessed == 4 * 4


def test_what_is_near_is_looked_for_for_a_while_and_only_when_much_was_copied() -> None:
    words = list(range(200, 220))
    for between, copied, back, found in [
        (7, 10, 17, True),
        (8, 10, 17, False),  # too late
        (7, 10, 18, False),  # too far
        (1, 5, 6, True),
        (1, 4, 5, False),  # too short a copy
        (1, 10, 9, False),  # what came before
    ]:
        lookup = PromptLookup([*SOURCE, 0, *SOURCE[:copied], *words[:between], SOURCE[back]])
        assert bool(lookup.guess(9)) == found, (between, copied, back)


def test_of_places_near_the_one_where_two_are_alike_comes_first() -> None:
    source = [10, 11, 12, 13, 14, 15, 7, 20, 6, 7, 21, 7, 22]
    lookup = PromptLookup([*source, 0, *source[:5], 7])
    assert lookup.guess(2) == [20, 6]
    lookup = PromptLookup([*source, 0, *source[:5], 6, 7])
    assert lookup.guess(2) == [21, 7]


def test_a_place_is_kept_though_its_tokens_occurred_again_since() -> None:
    """A triple in the midst of what is copied went on otherwise elsewhere, later."""
    assert PromptLookup([*SOURCE, 0, *SOURCE[4:7], 5, 0, *COPIED[:7]]).guess(2) == SOURCE[7:9]


def test_where_nothing_repeats_nothing_is_guessed() -> None:
    lookup = PromptLookup([])
    for token in range(100):
        lookup.append(token)
        assert lookup.guess(31) == []


def test_texts_too_short_to_look_anything_up() -> None:
    for n in range(4):
        assert PromptLookup([1] * n).guess(5) == []
