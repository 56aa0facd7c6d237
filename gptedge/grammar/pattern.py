"""Regular expressions of JSON Schema's `pattern` (ECMA-262, section 22.2), as languages of what JSON strings hold.

Does: alternatives, groups, classes, escapes, repetition, ^ at the beginning and $ at the end.
Does not: references back, looking ahead or behind, word boundaries, properties of Unicode.
"""

from __future__ import annotations

from gptedge.errors import SchemaError
from gptedge.grammar.characters import ANY, Ranges, character, complement, union
from gptedge.grammar.terms import END, Term, Terms

_DIGITS: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = union(
    (ord(c), ord(c))
    for c in (*"\t\n\v\f\r \xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff", *map(chr, range(0x2000, 0x200B)))
)
_LINE_ENDS: Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_HEX = {"x": 2, "u": 4}
_MOST_REPEATS = 10_000


def pattern_term(terms: Terms, pattern: str) -> Term:
    """Strings in which `pattern` is found, as they stand between quotes. Raises SchemaError where it cannot be read."""
    return _Parser(terms, pattern).parse()


class _Parser:
    def __init__(self, terms: Terms, pattern: str) -> None:
        self._terms, self._pattern, self._at = terms, pattern, 0
        self._anything = terms.repeat(character(terms, ANY))

    def parse(self) -> Term:
        term = self._alternatives(outermost=True)
        if self._at < len(self._pattern):
            raise self._error("a ) without its (")
        return term

    def _error(self, what: str) -> SchemaError:
        return SchemaError(f"the pattern {self._pattern!r} has {what} at character {self._at + 1}")

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        """Move on if `text` comes next."""
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _next(self) -> str:
        if not self._peek():
            raise self._error("an end too early")
        self._at += 1
        return self._pattern[self._at - 1]

    def _alternatives(self, *, outermost: bool = False) -> Term:
        options = [self._sequence(outermost)]
        while self._take("|"):
            options.append(self._sequence(outermost))
        return self._terms.either(*options)

    def _sequence(self, outermost: bool) -> Term:
        """What an alternative of the whole pattern does not tie to an end of the string may have anything there."""
        begins = self._take("^")
        if begins and not outermost:
            raise self._error("a ^ inside a group, which is not supported,")
        parts, ends = [], False
        while self._peek() and self._peek() not in "|)":
            if outermost and self._peek() == "$" and self._pattern[self._at + 1 : self._at + 2] in ("", "|"):
                ends = self._take("$")
                break
            parts.append(self._repeated(self._atom()))
        if outermost:
            parts = [*(() if begins else (self._anything,)), *parts, *(() if ends else (self._anything,))]
        return self._terms.seq(*parts)

    def _repeated(self, atom: Term) -> Term:
        bounds = self._bounds()
        if bounds is None:
            return atom
        self._take("?")  # which of several ways is found first makes no difference
        if self._bounds() is not None:
            raise self._error("nothing to repeat")
        least, most = bounds
        if most is not None and not least <= most <= _MOST_REPEATS:
            raise self._error(f"a repetition that is not in order, or above {_MOST_REPEATS},")
        return self._terms.repeat(atom, least, most)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        if not self._take("{"):
            return None
        inside = self._pattern[self._at :].partition("}")[0]
        least, comma, most = inside.partition(",")
        if not least.isdecimal() or not (most or "0").isdecimal() or self._at + len(inside) == len(self._pattern):
            raise self._error("a { that is no repetition; write \\{ for the character")
        self._at += len(inside) + 1
        return int(least), int(least) if not comma else int(most) if most else None

    def _atom(self) -> Term:
        match self._next():
            case "(":
                return self._group()
            case "[":
                return character(self._terms, self._class())
            case ".":
                return character(self._terms, complement(_LINE_ENDS))
            case "\\":
                return character(self._terms, self._escape())
            case "^" | "$" as anchor:
                raise self._error(f"a {anchor} in the middle, which is not supported,")
            case "*" | "+" | "?" | "{":
                raise self._error("nothing to repeat")
            case plain:
                return character(self._terms, _one(ord(plain)))

    def _group(self) -> Term:
        if self._take("?") and not self._take(":"):
            name = self._pattern[self._at + 1 : max(self._pattern.find(">", self._at), 0)]
            if not (self._take("<") and name.isidentifier() and self._take(f"{name}>")):
                raise self._error("looking ahead or behind, which is not supported,")
        term = END if self._peek() == ")" else self._alternatives()
        if not self._take(")"):
            raise self._error("a ( without its )")
        return term

    def _class(self) -> Ranges:
        negated, ranges = self._take("^"), list[tuple[int, int]]()
        while not self._take("]"):
            low = self._class_atom()
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("]", "") and _is_one(low):
                self._at += 1
                high = self._class_atom()
                if not _is_one(high) or high[0][0] < low[0][0]:
                    raise self._error("a range that is not in order")
                low = ((low[0][0], high[0][0]),)
            ranges += low
        return complement(union(ranges)) if negated else union(ranges)

    def _class_atom(self) -> Ranges:
        c = self._next()
        if c != "\\":
            return _one(ord(c))
        return _one(8) if self._take("b") else self._escape()

    def _escape(self) -> Ranges:
        c = self._next()
        if c.lower() in _CLASSES:
            ranges = _CLASSES[c.lower()]
            return ranges if c.islower() else complement(ranges)
        if c in _HEX:
            digits = self._pattern[self._at : self._at + _HEX[c]]
            if len(digits) < _HEX[c] or not all(d in "0123456789abcdefABCDEF" for d in digits):
                raise self._error(f"a \\{c} without its {_HEX[c]} digits")
            self._at += _HEX[c]
            return _one(int(digits, 16))
        if c in _CONTROLS:
            return _one(_CONTROLS[c])
        if c.isalnum():
            raise self._error(f"\\{c}, which is not supported,")
        return _one(ord(c))


def _one(code: int) -> Ranges:
    return union([(code, code)])


def _is_one(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][0] == ranges[0][1]
