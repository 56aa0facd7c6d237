"""Batches: every text of a list comes out as it would alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gptedge
from gptedge.runtime.session import Session

PROMPTS = [
    "The quick",
    "漢字かな交じり文",
    "0",
    "",
    "lazy dog " * 20,
    "👩‍👩‍👧 and",
    "fox jumps over",
    "some more text, so that",
]

ENDING = {"max_tokens": 40, "stop": ["e", "D", "9", ">"]}
"""Texts end one after another."""


@pytest.fixture(scope="module", params=["tiny_bundle", "float_small_cache_bundle"])
def model(request: pytest.FixtureRequest) -> gptedge.Model:
    return gptedge.load(request.getfixturevalue(request.param), threads=1)


def same(together: list[gptedge.Result], alone: list[gptedge.Result]) -> None:
    for a, b in zip(together, alone, strict=True):
        assert (a.token_ids, a.text, a.finish_reason, a.usage) == (b.token_ids, b.text, b.finish_reason, b.usage)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 99])
def test_unequal_lengths_come_out_as_alone(model: gptedge.Model, batch_size: int) -> None:
    alone = [model.run(p, **ENDING) for p in PROMPTS]
    together = model.run(PROMPTS, batch_size=batch_size, **ENDING)
    same(together, alone)
    assert len({len(r.token_ids) for r in together}) > 3
    assert model.generate(PROMPTS, **ENDING) == [r.text for r in alone]


def test_growing_caches_take_turns(portable_bundle: Path) -> None:
    model = gptedge.load(portable_bundle, threads=1)
    same(model.run(PROMPTS[:3], max_tokens=9), [model.run(p, max_tokens=9) for p in PROMPTS[:3]])


def test_every_setting_is_each_texts_own(model: gptedge.Model) -> None:
    params = {
        "max_tokens": 40,
        "temperature": 1.0,
        "seed": 3,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.1,
        "stop": ["e", "の"],
        "logprobs": 2,
    }
    alone, together = [model.run(p, **params) for p in PROMPTS], model.run(PROMPTS, **params)
    same(together, alone)
    for a, b in zip(together, alone, strict=True):
        assert a.logprobs is not None
        assert b.logprobs is not None
        assert [x.token_id for x in a.logprobs] == [x.token_id for x in b.logprobs]
        np.testing.assert_allclose([x.logprob for x in a.logprobs], [x.logprob for x in b.logprobs], atol=1e-4)


def test_rows_outgrow_their_room(model: gptedge.Model) -> None:
    """Caches begin with room for 256 tokens; here some need more while others are under way."""
    endless = dict.fromkeys(model.bundle.eos_ids, -1e4)
    prompts = ["The quick " * 40, "fox", "lazy dog"]
    same(
        model.run(prompts, max_tokens=250, logit_bias=endless),
        [model.run(p, max_tokens=250, logit_bias=endless) for p in prompts],
    )


def test_full_contexts(model: gptedge.Model) -> None:
    prompts = ["word " * 500, "fox", "lazy dog " * 25]
    with pytest.raises(gptedge.ContextOverflowError, match=r"^prompt 2 of the list: the prompt has 2000 tokens"):
        model.run(["fox", *prompts], max_tokens=5)
    params = {"max_tokens": 320, "context_overflow": "shift", "logit_bias": dict.fromkeys(model.bundle.eos_ids, -1e4)}
    same(model.run(prompts, **params), [model.run(p, **params) for p in prompts])


def test_rows_that_have_ended_are_not_run(model: gptedge.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run_rows = Session.run_rows

    def counted(self: Session, ids: list[int], *rest: object) -> object:
        sizes.append(len(ids))
        return run_rows(self, ids, *rest)

    monkeypatch.setattr(Session, "run_rows", counted)
    results = model.run(PROMPTS, batch_size=4, **ENDING)
    assert max(sizes) == 4
    assert sum(sizes) == sum(len(r.token_ids) - 1 for r in results)  # the last token of each is never run
    assert sizes[-1] < 4


def test_a_list_of_one_is_run_as_alone(model: gptedge.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where guesses are checked, kernels give it the same last bits."""
    monkeypatch.setattr(Session, "run_rows", None)
    same(model.run(["fox"], max_tokens=9), [model.run("fox", max_tokens=9)])


def test_small_lists_and_bad_sizes(model: gptedge.Model) -> None:
    assert model.generate([]) == []
    assert model.generate(["fox"], max_tokens=4) == [model.generate("fox", max_tokens=4)]
    assert [r.finish_reason for r in model.run(["a", "b"], max_tokens=0)] == ["length", "length"]
    for size in (0, -1, "a", 1.5, True, None):
        with pytest.raises(gptedge.UsageError, match=f"batch_size is {size!r}; it must be a whole number, at least 1"):
            model.generate(["a", "b"], batch_size=size)


def test_quantized_batches_differ_by_rounding_alone(quantized_bundle: Path) -> None:
    """Not token for token: the kernels may sum in another order for one row than for several."""
    model = gptedge.load(quantized_bundle, threads=1)
    params = {"max_tokens": 6, "logprobs": 0}
    for a, b in zip(model.run(PROMPTS, **params), [model.run(p, **params) for p in PROMPTS], strict=True):
        assert a.logprobs is not None
        assert b.logprobs is not None
        for x, y in zip(a.logprobs, b.logprobs, strict=False):
            assert abs(x.logprob - y.logprob) < 0.1
            if x.token_id != y.token_id:
                break
