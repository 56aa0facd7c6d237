"""Languages of bytes as terms, and what is left of one after a byte: its derivative (Brzozowski 1964,
doi:10.1145/321239.321249).

    "abc" after a    "bc"
    x* after b       (x after b) x*
    x y after b      (x after b) y, or also y after b where x may be empty

A term is known by a number, and equal terms by the same, so that few are ever made: a long string of any characters
goes from one term to itself. Names stand for terms that contain themselves, as JSON's values do; these are never empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from gptedge.errors import SchemaError

Term = int
NOTHING: Term = 0
"""No text at all."""
END: Term = 1
"""The empty text alone."""
_MOST_TERMS = 500_000
"""Patterns can ask for exponentially many."""


class Terms:
    """Makes terms, and remembers them. Raises SchemaError where they become too many."""

    def __init__(self) -> None:
        self._nodes: list[tuple[Any, ...]] = []
        self._numbers: dict[tuple[Any, ...], Term] = {}
        self._ends: list[bool] = []
        self._afters: dict[tuple[Term, int], Term] = {}
        self._meets: dict[tuple[Term, Term], bool] = {}
        self._named: dict[str, Term] = {}
        self._number("either", (), ends=False)
        self._number("text", b"", ends=True)

    def _number(self, *node: Any, ends: bool) -> Term:
        if node not in self._numbers:
            if len(self._nodes) >= _MOST_TERMS:
                raise SchemaError("the schema is too complicated: simplify its patterns and counts")
            self._numbers[node] = len(self._nodes)
            self._nodes.append(node)
            self._ends.append(ends)
        return self._numbers[node]

    # ---- making them ---------------------------------------------------------------------------------------------

    def text(self, value: bytes) -> Term:
        return self._number("text", value, ends=not value)

    def byte(self, allowed: Iterable[int]) -> Term:
        """One byte out of some."""
        mask = sum(1 << b for b in set(allowed))
        return self._number("byte", mask, ends=False) if mask else NOTHING

    def seq(self, *parts: Term) -> Term:
        """One after the other."""
        rest = END
        for part in reversed(parts):
            rest = self._before(part, rest)
        return rest

    def _before(self, first: Term, rest: Term) -> Term:
        if NOTHING in (first, rest):
            return NOTHING
        if END in (first, rest):
            return rest if first == END else first
        chain = []  # no first part is a sequence itself: then equal languages are equal terms more often
        while self._nodes[first][0] == "seq":
            _, head, first = self._nodes[first]
            chain.append(head)
        for part in (first, *reversed(chain)):
            rest = self._number("seq", part, rest, ends=self._ends[part] and self._ends[rest])
        return rest

    def either(self, *options: Term) -> Term:
        found = set[Term]()
        for option in options:
            found.update(self._nodes[option][1] if self._nodes[option][0] == "either" else (option,))
        if len(found) == 1:
            return found.pop()
        return self._number("either", tuple(sorted(found)), ends=any(self._ends[t] for t in found))

    def both(self, a: Term, b: Term) -> Term:
        """Texts of both languages; NOTHING where there is none. For languages of finitely many terms, without names."""
        if a == b:
            return a
        a, b = sorted((a, b))
        if not self._meet(a, b):
            return NOTHING
        return self._number("both", a, b, ends=self._ends[a] and self._ends[b])

    def other(self, a: Term) -> Term:
        """Every text that is not of this language; for use in `both`."""
        return self._number("other", a, ends=not self._ends[a])

    def repeat(self, part: Term, least: int = 0, most: int | None = None) -> Term:
        """`part` at least, and at most, so many times."""
        if self._ends[part]:
            least = 0
        if part in (NOTHING, END) or most == 0:
            return END if not least else NOTHING
        if most == 1:
            return part if least else self.either(part, END)
        return self._number("repeat", part, least, most, ends=not least)

    def optional(self, *parts: Term) -> Term:
        return self.either(self.seq(*parts), END)

    def later(self, name: str) -> Term:
        """The term that `define` gives, before or afterwards."""
        return self._number("later", name, ends=False)

    def define(self, name: str, term: Term) -> None:
        self._named[name] = term

    # ---- reading them --------------------------------------------------------------------------------------------

    def may_end(self, term: Term) -> bool:
        """Whether the empty text is of this language."""
        return self._ends[term]

    def after(self, term: Term, byte: int) -> Term:
        """What may follow `byte` in this language's texts; NOTHING where none begins with it."""
        key = (term, byte)
        if key not in self._afters:
            self._afters[key] = self._derive(term, byte)
        return self._afters[key]

    def holds(self, term: Term, text: bytes) -> bool:
        """Whether a text is of this language."""
        for byte in text:
            term = self.after(term, byte)
        return self.may_end(term)

    def _derive(self, term: Term, byte: int) -> Term:
        after = partial(self.after, byte=byte)
        match self._nodes[term]:
            case "text", value:
                return self.text(value[1:]) if value and value[0] == byte else NOTHING
            case "byte", mask:
                return END if mask >> byte & 1 else NOTHING
            case "seq", first, rest:
                left = self._before(after(first), rest)
                return self.either(left, after(rest)) if self._ends[first] else left
            case "either", options:
                return self.either(*map(after, options))
            case "both", a, b:
                return self.both(after(a), after(b))
            case "other", a:
                return self.other(after(a))
            case "repeat", part, least, most:
                rest = self.repeat(part, max(least - 1, 0), None if most is None else most - 1)
                return self._before(after(part), rest)
            case "later", name:
                return after(self._named[name])
        raise AssertionError(self._nodes[term])

    def going_in_circles(self) -> str | None:
        """A name that stands at the beginning of its own texts, which `after` would never come to the end of."""
        return next((name for name in self._named if self._begins_with(name)), None)

    def _begins_with(self, name: str) -> bool:
        stack, seen = [self._named[name]], set[Term]()
        while stack:
            term = stack.pop()
            if term in seen:
                continue
            seen.add(term)
            match self._nodes[term]:
                case "later", found:
                    if found == name:
                        return True
                    stack.append(self._named[found])
                case "seq", first, rest:
                    stack += (first, rest) if self._ends[first] else (first,)
                case "either", options:
                    stack += options
                case "both", a, b:
                    stack += (a, b)
                case "repeat", part, _, _:
                    stack.append(part)
        return False

    def without_end(self) -> str | None:
        """A name none of whose texts is ever whole."""
        ending, before = set[str](), -1
        while len(ending) != before:
            before = len(ending)
            ending |= {name for name, term in self._named.items() if self._can_end(term, ending)}
        return next((name for name in self._named if name not in ending), None)

    def _can_end(self, term: Term, ending: set[str]) -> bool:
        """Whether some text is whole, those of the names in `ending` being so."""
        while self._nodes[term][0] == "seq":
            _, first, term = self._nodes[term]
            if not self._can_end(first, ending):
                return False
        match self._nodes[term]:
            case "either", options:
                return any(self._can_end(option, ending) for option in options)
            case "repeat", part, least, _:
                return not least or self._can_end(part, ending)
            case "later", name:
                return name in ending
        return True

    def _meet(self, a: Term, b: Term) -> bool:
        """Whether some text is of both languages: a search through what is left of the two after ever more bytes."""
        came_from: dict[tuple[Term, Term], tuple[Term, Term] | None] = {(a, b): None}
        stack = [(a, b)]
        while stack:
            pair = stack.pop()
            if NOTHING in pair or self._meets.get(pair) is False:
                continue
            if self._meets.get(pair) or (self._ends[pair[0]] and self._ends[pair[1]]):
                at: tuple[Term, Term] | None = pair
                while at is not None:
                    self._meets[at], at = True, came_from[at]
                return True
            for left in {(self.after(pair[0], i), self.after(pair[1], i)) for i in range(256)}:
                if left not in came_from:
                    came_from[left] = pair
                    stack.append(left)
        self._meets.update(dict.fromkeys(came_from, False))
        return False
