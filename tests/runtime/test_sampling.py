"""Sampling on small known distributions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from gptedge.config import SamplingParams
from gptedge.errors import UsageError
from gptedge.model import sampling_params
from gptedge.runtime.sampling import Sampler, _nucleus, check_bias, largest, logprob_of, pick

PROBABILITIES = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
LOGITS = np.log(PROBABILITIES).astype(np.float32)
DRAWS = 10_000


def frequencies(params: SamplingParams, logits: np.ndarray = LOGITS) -> np.ndarray:
    sampler = Sampler(params, [], len(logits))
    counts = Counter(sampler.choose(logits) for _ in range(DRAWS))
    return np.array([counts[i] / DRAWS for i in range(len(logits))])


def renormalised(kept: list[int], power: float = 1.0) -> np.ndarray:
    p = np.zeros_like(PROBABILITIES)
    p[kept] = PROBABILITIES[kept] ** power
    return p / p.sum()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"temperature": 1.0}, PROBABILITIES),
        ({"temperature": 2.0}, renormalised([0, 1, 2, 3, 4], 0.5)),
        ({"temperature": 1.0, "top_k": 2}, renormalised([0, 1])),
        ({"temperature": 1.0, "top_k": 99}, PROBABILITIES),
        ({"temperature": 1.0, "top_p": 0.65}, renormalised([0, 1])),
        ({"temperature": 1.0, "top_p": 0.71}, renormalised([0, 1, 2])),
        ({"temperature": 1.0, "top_p": 0.0}, renormalised([0])),
        ({"temperature": 1.0, "min_p": 0.25}, renormalised([0, 1, 2])),
        ({"temperature": 1.0, "min_p": 1.0}, renormalised([0])),
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.75, "min_p": 0.25}, renormalised([0, 1, 2])),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, renormalised([0, 1])),  # 0.7 of the 0.85 that top_k leaves
        ({"temperature": 2.0, "min_p": 0.6}, renormalised([0, 1], 0.5)),
        ({"temperature": 1.0, "logit_bias": {0: -100.0}}, renormalised([1, 2, 3, 4])),
        ({"temperature": 1.0, "logit_bias": {3: float(np.log(2)), 4: -100.0}}, np.array([10, 4, 3, 4, 0]) / 21),
        ({"temperature": 0.0}, renormalised([0])),
        ({"temperature": 1e-29, "min_p": 0.5}, renormalised([0])),
        ({"temperature": 1e-40, "logit_bias": {0: 1e6}}, renormalised([0])),
        ({"temperature": 1e-46, "top_p": 0.5}, renormalised([0])),
        ({"temperature": 1e-46, "min_p": 0.5}, renormalised([0])),
    ],
)
def test_distribution(changes: dict[str, object], expected: np.ndarray) -> None:
    got = frequencies(SamplingParams(seed=1, **changes))  # type: ignore[arg-type]
    # Four standard deviations of a frequency; exact where a token is ruled out.
    np.testing.assert_array_less(np.abs(got - expected), 4 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-12)


def wide_logits(seed: int, n: int = 3001) -> np.ndarray:
    """Of a vocabulary of several blocks and a rest, with many equal values."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * (0.1, 1, 3, 9)[seed % 4]).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_draws_of_a_large_vocabulary_are_in_proportion(seed: int) -> None:
    """Every index gets its share of the random numbers from 0 to 1, those at the ends of blocks too."""
    weights = np.exp(wide_logits(seed))
    weights[[0, 511, 512, 3000]] = [0, 5, 7, 0]
    exact = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    for u in (*np.random.default_rng(seed).random(2000), 0.0, np.nextafter(1, 0)):
        index = pick(weights, u)
        assert weights[index] > 0
        assert exact[index] - weights[index] / weights.sum() - 1e-5 <= u <= exact[index] + 1e-5


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_filters_keep_what_sorting_everything_keeps(seed: int, share: float) -> None:
    logits = wide_logits(seed)
    order = np.argsort(-logits, kind="stable")
    for k in (1, 2, 40, 2999, 3001, 9999):
        ids = largest(logits, k)
        assert len(ids) == min(k, 3001)
        np.testing.assert_array_equal(np.sort(logits[ids]), np.sort(logits[order[:k]]))
    weights = np.exp(logits - logits.max())
    sums = np.cumsum(weights[order], dtype=np.float64)
    kept = _nucleus(weights, share)
    n = len(kept)
    np.testing.assert_array_equal(np.sort(order[:n]), kept)
    goal = share * sums[-1]
    assert n == 1 or sums[n - 2] < goal * (1 + 1e-6) or share == 1
    assert sums[n - 1] >= goal * (1 - 1e-6)


def test_seed_decides() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [], 5)
        return [sampler.choose(LOGITS) for _ in range(50)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_repetition_penalty_looks_at_prompt_and_output() -> None:
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=1.5), [0], 4)
    assert sampler.choose(logits) == 1  # 2.0 / 1.5 < 1.9
    assert sampler.choose(logits) == 0  # both divided now
    negative = np.array([-1.0, -1.1, -9.0, -9.0], np.float32)
    assert Sampler(SamplingParams(repetition_penalty=2.0), [0], 4).choose(negative) == 1  # -1.0 * 2 < -1.1
    assert logits[0] == np.float32(2.0)


def test_presence_and_frequency_penalties_look_at_output_only() -> None:
    logits = np.array([1.0, 0.7, 0.0], np.float32)
    presence = Sampler(SamplingParams(presence_penalty=0.5), [0, 0, 0], 3)
    assert [presence.choose(logits) for _ in range(3)] == [0, 1, 0]
    frequency = Sampler(SamplingParams(frequency_penalty=0.2), [0], 3)
    assert [frequency.choose(logits) for _ in range(4)] == [0, 0, 1, 0]


def test_logprobs_are_of_the_model_itself() -> None:
    lp = logprob_of(LOGITS, 2, 3)
    assert lp.logprob == pytest.approx(np.log(0.15), abs=1e-6)
    assert [i for i, _ in lp.top] == [0, 1, 2]
    assert [v for _, v in lp.top] == pytest.approx(np.log(PROBABILITIES[:3]).tolist(), abs=1e-6)
    assert logprob_of(LOGITS, 4, 0).top == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"min_p": -1},
        {"top_k": -1},
        {"max_tokens": -1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"stop": ("",)},
        {"logprobs": -1},
        {"temperature": "hot"},
        {"temperature": True},
        {"max_tokens": 2.5},
        {"max_tokens": None},
        {"temperature": float("inf")},
        {"top_p": -0.01},
        {"min_p": float("nan")},
        {"top_k": 1.0},
        {"repetition_penalty": 101},
        {"presence_penalty": float("-inf")},
        {"frequency_penalty": -101},
        {"seed": 2**63},
        {"logprobs": 1001},
        {"logit_bias": {0: float("nan")}},
        {"logit_bias": {0: 1e9}},
        {"logit_bias": {0: "much"}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"0": 1.0}},
        {"stop": ("a", 3)},
        {"stop": 3},
        {"logit_bias": [1]},
    ],
)
def test_bad_values_are_refused_with_value_and_bound(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"must be a (whole )?number from|empty string|must be strings|must map"):
        sampling_params(None, changes)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="'temprature' is not a sampling parameter"):
        sampling_params(None, {"temprature": 1})


def test_bias_of_a_token_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="logit_bias names the token 5"):
        check_bias(SamplingParams(logit_bias={4: 1.0, 5: 1.0}), 5)
