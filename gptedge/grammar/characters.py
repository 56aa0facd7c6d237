"""Characters as they stand in JSON's strings: UTF-8 (RFC 3629), and what must be escaped (RFC 8259, section 7)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gptedge.grammar.terms import Term, Terms

Ranges = tuple[tuple[int, int], ...]
"""Code points, first and last of each range, in rising order."""

ANY: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
"""All that UTF-8 can hold: no surrogates."""
_ESCAPES = {ord(c): f"\\{name}".encode() for c, name in zip('"\\\b\f\n\r\t', '"\\bfnrt', strict=True)}
_CONTROL = range(0x20)
_LENGTH_ENDS = (0x7F, 0x7FF, 0xFFFF, 0x10FFFF)
"""The last code points of one byte, of two, and so on."""


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """In order, without overlaps, and of what UTF-8 can hold."""
    made: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if made and low <= made[-1][1] + 1:
            made[-1] = (made[-1][0], max(high, made[-1][1]))
        else:
            made.append((low, high))
    return tuple(
        (max(low, first), min(high, last))
        for low, high in made
        for first, last in ANY
        if max(low, first) <= min(high, last)
    )


def complement(ranges: Ranges) -> Ranges:
    made, start = [], 0
    for low, high in ranges:
        made.append((start, low - 1))
        start = high + 1
    return union(r for r in (*made, (start, ANY[-1][1])) if r[0] <= r[1])


def character(terms: Terms, ranges: Ranges) -> Term:
    """One character out of `ranges`, within a JSON string."""
    plain = [(low, high) for low, high in ranges for low, high in _without_escaped(low, high)]
    escaped = [c for c in (*_CONTROL, *_ESCAPES) if any(low <= c <= high for low, high in ranges)]
    options = [terms.text(_ESCAPES.get(c, f"\\u{c:04x}".encode())) for c in dict.fromkeys(escaped)]
    return terms.either(*options, *(_utf8(terms, low, high) for low, high in plain))


def any_character(terms: Terms) -> Term:
    """One character in any of the ways in which a JSON string can hold it; surrogates stay out."""
    digit, not_d = terms.byte(b"0123456789abcdefABCDEF"), terms.byte(b"0123456789abcefABCEF")
    before_surrogates = terms.seq(terms.byte(b"dD"), terms.byte(b"01234567"))
    four = terms.seq(terms.either(terms.seq(not_d, digit), before_surrogates), digit, digit)
    return terms.either(character(terms, ANY), terms.text(b"\\/"), terms.seq(terms.text(b"\\u"), four))


def _without_escaped(low: int, high: int) -> Iterator[tuple[int, int]]:
    low = max(low, len(_CONTROL))
    for c in sorted(_ESCAPES):
        if low <= c <= high:
            if low < c:
                yield low, c - 1
            low = c + 1
    if low <= high:
        yield low, high


def _utf8(terms: Terms, low: int, high: int) -> Term:
    """The characters of a range of code points, by their bytes."""
    options, start = [], low
    for end in _LENGTH_ENDS:
        if start <= min(high, end):
            options.append(_bytes_between(terms, chr(start).encode(), chr(min(high, end)).encode()))
            start = end + 1
    return terms.either(*options)


def _bytes_between(terms: Terms, low: bytes, high: bytes) -> Term:
    """UTF-8 of one length, from `low` up to `high`."""
    if len(low) == 1:
        return terms.byte(range(low[0], high[0] + 1))
    least, most = b"\x80" * (len(low) - 1), b"\xbf" * (len(low) - 1)
    if low[0] == high[0]:
        return terms.seq(terms.byte([low[0]]), _bytes_between(terms, low[1:], high[1:]))
    options, first, last = [], low[0], high[0]
    if low[1:] != least:
        options.append(terms.seq(terms.byte([first]), _bytes_between(terms, low[1:], most)))
        first += 1
    if high[1:] != most:
        options.append(terms.seq(terms.byte([last]), _bytes_between(terms, least, high[1:])))
        last -= 1
    if first <= last:
        options.append(terms.seq(terms.byte(range(first, last + 1)), _bytes_between(terms, least, most)))
    return terms.either(*options)
