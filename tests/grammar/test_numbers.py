"""Numbers between bounds, against what Python's decimals say of them."""

from __future__ import annotations

import itertools
import json
from decimal import Decimal

import pytest

from gptedge.grammar.numbers import MOST_DIGITS, Bound, Numbers
from gptedge.grammar.terms import NOTHING, Terms
from tests.grammar.conftest import drawn, holds

VALUES = ["0", "0.5", "0.05", "9", "10", "12.34", "12.3", "99", "100", "101", "1000", "0.999", "7.0", "7.50"]
TEXTS = sorted({sign + v for v in VALUES for sign in ("", "-")} | {str(n) for n in range(-130, 131)})
BOUNDS = [
    None,
    *(Bound(Decimal(v), e) for v in ("0", "7", "-7", "12.3", "-12.34", "100", "-99") for e in (False, True)),
]


def inside(text: str, low: Bound | None, high: Bound | None) -> bool:
    value = Decimal(text)
    above = low is None or value > low.value or (value == low.value and not low.excluded)
    below = high is None or value < high.value or (value == high.value and not high.excluded)
    return above and below


@pytest.mark.parametrize("low", BOUNDS, ids=str)
def test_bounds_are_kept(low: Bound | None) -> None:
    terms = Terms()
    numbers = Numbers(terms)
    for high in BOUNDS:
        number, integer = numbers.number(low, high), numbers.integer(low, high)
        for text in TEXTS:
            if Decimal(text) or not text.startswith("-"):  # -0 may be left out
                assert holds(terms, number, text) == inside(text, low, high), (text, low, high)
                assert holds(terms, integer, text) == ("." not in text and inside(text, low, high)), (text, low, high)


def test_what_is_drawn_is_a_number_within_them() -> None:
    terms = Terms()
    for seed, (low, high) in enumerate(itertools.product(BOUNDS, BOUNDS)):
        for term in (Numbers(terms).number(low, high), Numbers(terms).integer(low, high)):
            if term == NOTHING:
                assert low is not None
                assert high is not None
                assert (
                    high.value - low.value <= 0 or low.excluded or high.excluded or high.value < low.value.to_integral()
                )
                continue
            text = drawn(terms, term, seed)
            assert text is not None
            json.loads(text)
            assert inside(text.decode(), low, high)


def test_only_what_json_calls_a_number() -> None:
    terms = Terms()
    number, integer = Numbers(terms).number(None, None), Numbers(terms).integer(None, None)
    for text in ("0", "-1", "1.5e3", "2E-07", "1e+9", "1" * MOST_DIGITS):
        assert holds(terms, number, text), text
    for text in ("", "-", "01", "1.", ".5", "+1", "1e", "1e999", "0x1", "NaN", "1" * (MOST_DIGITS + 1)):
        assert not holds(terms, number, text), text
    assert not holds(terms, integer, "1.0")
    assert not holds(terms, integer, "1e3")
