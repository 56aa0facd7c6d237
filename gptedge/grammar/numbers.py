"""JSON's numbers (RFC 8259, section 6) between bounds, as languages of digits."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from gptedge.grammar.terms import END, NOTHING, Term, Terms

MOST_DIGITS = 15
"""Before the point, and behind it: float64 holds so many, and a model that repeats itself must stop somewhere."""


@dataclass(frozen=True)
class Bound:
    value: Decimal
    excluded: bool = False

    @property
    def digits(self) -> tuple[str, str]:
        """Of the absolute value: before the point, and behind it without trailing zeros."""
        whole, _, fraction = f"{abs(self.value):f}".partition(".")
        return whole, fraction.rstrip("0")


class Numbers:
    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._digit, self._non_zero = terms.byte(b"0123456789"), terms.byte(b"123456789")
        self._zeros, self._digits = terms.repeat(terms.text(b"0")), terms.repeat(self._digit)
        self._sign = terms.optional(terms.text(b"-"))

    def integer(self, low: Bound | None, high: Bound | None) -> Term:
        return self._between(self._terms.seq(self._sign, self._whole(MOST_DIGITS)), low, high)

    def number(self, low: Bound | None, high: Bound | None) -> Term:
        """With an exponent only where there are no bounds."""
        t = self._terms
        fraction = t.optional(t.text(b"."), t.repeat(self._digit, 1, MOST_DIGITS))
        exponent = t.optional(t.byte(b"eE"), t.optional(t.byte(b"+-")), t.repeat(self._digit, 1, 2))
        plain = t.seq(self._sign, self._whole(MOST_DIGITS), fraction)
        return t.seq(plain, exponent) if low is None and high is None else self._between(plain, low, high)

    def _whole(self, most: int) -> Term:
        t = self._terms
        return t.either(t.text(b"0"), t.seq(self._non_zero, t.repeat(self._digit, 0, most - 1)))

    def _between(self, numbers: Term, low: Bound | None, high: Bound | None) -> Term:
        if low is not None:
            numbers = self._terms.both(numbers, self._at_least(low))
        if high is not None:
            numbers = self._terms.both(numbers, self._at_most(high))
        return numbers

    def _at_least(self, bound: Bound) -> Term:
        if bound.value > 0 or (bound.value == 0 and bound.excluded):
            return self._from(bound)
        return self._terms.either(self._positive(), self._negative(self._up_to(bound)))

    def _at_most(self, bound: Bound) -> Term:
        if bound.value < 0 or (bound.value == 0 and bound.excluded):
            return self._negative(self._from(bound))
        return self._terms.either(self._negative(self._positive()), self._up_to(bound))

    def _positive(self) -> Term:
        t = self._terms
        return t.seq(self._digit, self._digits, t.optional(t.text(b"."), self._digits))

    def _negative(self, positive: Term) -> Term:
        return self._terms.seq(self._terms.text(b"-"), positive)

    def _from(self, bound: Bound) -> Term:
        """Positive numbers from the absolute value of a bound on."""
        t, (whole, fraction) = self._terms, bound.digits
        any_fraction = t.optional(t.text(b"."), self._digits)
        longer = t.seq(self._non_zero, *[self._digit] * len(whole), self._digits, any_fraction)
        options = [longer, t.seq(t.text(whole.encode()), self._fraction_from(fraction, bound.excluded))]
        for i, digit in enumerate(whole):
            larger = t.byte(range(ord(digit) + 1, ord("9") + 1))
            rest = [self._digit] * (len(whole) - i - 1)
            options.append(t.seq(t.text(whole[:i].encode()), larger, *rest, any_fraction))
        return t.either(*options)

    def _up_to(self, bound: Bound) -> Term:
        """Positive numbers, and 0, up to the absolute value of a bound."""
        t, (whole, fraction) = self._terms, bound.digits
        any_fraction = t.optional(t.text(b"."), self._digits)
        options = [t.seq(t.text(whole.encode()), self._fraction_up_to(fraction, bound.excluded))]
        if len(whole) > 1:
            options.append(t.seq(self._whole(len(whole) - 1), any_fraction))
        for i, digit in enumerate(whole):
            smaller = t.byte(range(ord("0") + (i == 0 and len(whole) > 1), ord(digit)))
            rest = [self._digit] * (len(whole) - i - 1)
            options.append(t.seq(t.text(whole[:i].encode()), smaller, *rest, any_fraction))
        return t.either(*options)

    def _fraction_from(self, least: str, excluded: bool) -> Term:
        """A point and digits from `least` on, or nothing where that may be."""
        t = self._terms
        behind_point = t.seq(t.text(b"."), self._digits_from(least, excluded))
        return behind_point if least or excluded else t.either(END, behind_point)

    def _digits_from(self, least: str, excluded: bool) -> Term:
        t = self._terms
        if not least:
            return t.seq(self._digits, self._non_zero, self._digits) if excluded else self._digits
        larger = t.seq(t.byte(range(ord(least[0]) + 1, ord("9") + 1)), self._digits)
        return t.either(larger, t.seq(t.text(least[:1].encode()), self._digits_from(least[1:], excluded)))

    def _fraction_up_to(self, most: str, excluded: bool) -> Term:
        t = self._terms
        behind_point = t.seq(t.text(b"."), self._digits_up_to(most, excluded))
        return t.either(END, behind_point) if most or not excluded else behind_point

    def _digits_up_to(self, most: str, excluded: bool) -> Term:
        t = self._terms
        if not most:
            return NOTHING if excluded else self._zeros
        smaller = t.seq(t.byte(range(ord("0"), ord(most[0]))), self._digits)
        rest = self._digits_up_to(most[1:], excluded)
        return t.either(smaller, t.seq(t.text(most[:1].encode()), t.either(rest, END) if most[1:] else rest))
