"""Languages of bytes: what may follow, what is left, and what can never end."""

from __future__ import annotations

import itertools

import pytest

from gptedge.errors import UsageError
from gptedge.grammar import terms as terms_module
from gptedge.grammar.terms import END, NOTHING, Term, Terms
from tests.grammar.conftest import holds

WORDS = ["".join(w) for n in range(5) for w in itertools.product("ab", repeat=n)]


def words(terms: Terms, term: Term) -> set[str]:
    return {w for w in WORDS if holds(terms, term, w)}


def test_terms_are_the_languages_they_say() -> None:
    t = Terms()
    a, b = t.text(b"a"), t.byte(b"b")
    some = t.repeat(t.either(a, t.seq(b, b)))
    assert words(t, NOTHING) == set()
    assert words(t, END) == {""}
    assert words(t, t.seq(a, b, END)) == {"ab"}
    assert words(t, t.optional(a, b)) == {"", "ab"}
    assert words(t, t.repeat(a, 2, 3)) == {"aa", "aaa"}
    assert words(t, t.repeat(t.optional(a), 3, 3)) == {"", "a", "aa", "aaa"}
    assert words(t, some) == {w for w in WORDS if "b" not in w.replace("bb", "")}
    assert words(t, t.both(some, t.repeat(t.byte(b"ab"), 3, 3))) == {"aaa", "abb", "bba"}
    assert words(t, t.both(some, t.other(t.repeat(a)))) == words(t, some) - {"", "a", "aa", "aaa", "aaaa"}


def test_equal_terms_have_one_number() -> None:
    """Or long strings would make ever more of them."""
    t = Terms()
    string = t.seq(t.repeat(t.byte(range(97, 123))), t.text(b'"'), t.text(b"}"))
    assert t.after(t.after(string, ord("x")), ord("y")) == string
    assert t.seq(t.seq(t.text(b"a"), t.byte(b"b")), t.byte(b"c")) == t.seq(
        t.text(b"a"), t.seq(t.byte(b"b"), t.byte(b"c"))
    )
    assert t.either(t.text(b"a"), t.either(NOTHING, t.text(b"b"))) == t.either(t.text(b"b"), t.text(b"a"))


def test_a_way_that_has_no_end_is_none() -> None:
    """Each letter may come first, but after a second a no third one makes the text end in b."""
    t = Terms()
    letters = t.repeat(t.byte(b"ab"))
    both = t.both(t.seq(t.text(b"a"), letters, t.text(b"b")), t.repeat(t.byte(b"ab"), 0, 2))
    assert words(t, both) == {"ab"}
    assert t.after(t.after(both, ord("a")), ord("a")) == NOTHING
    assert t.both(t.text(b"a"), t.text(b"b")) == NOTHING


def test_names_hold_themselves() -> None:
    t = Terms()
    nested = t.either(t.text(b"b"), t.seq(t.text(b"a"), t.later("x"), t.text(b"a")))
    t.define("x", nested)
    assert words(t, nested) == {"b", "aba"}
    assert holds(t, nested, "a" * 300 + "b" + "a" * 300)
    assert not holds(t, nested, "a" * 300 + "b" + "a" * 299)
    assert t.going_in_circles() is None
    assert t.without_end() is None


def test_circles_and_texts_without_end_are_found() -> None:
    t = Terms()
    t.define("x", t.either(t.text(b"a"), t.seq(t.repeat(t.text(b"b")), t.later("y"))))
    t.define("y", t.later("x"))
    assert t.going_in_circles() in ("x", "y")
    t = Terms()
    t.define("x", t.seq(t.text(b"a"), t.later("x")))
    assert t.going_in_circles() is None
    assert t.without_end() == "x"


def test_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms_module, "_MOST_TERMS", 500)
    t = Terms()
    letters = t.byte(b"ab")
    with pytest.raises(UsageError, match="too complicated"):  # the places of the last 20 letters: 2^20 terms
        t.both(t.seq(t.repeat(letters), t.text(b"a"), t.repeat(letters, 20, 20)), t.repeat(letters, 60, 60))
