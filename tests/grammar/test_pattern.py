"""Patterns, against Python's own regular expressions."""

from __future__ import annotations

import json
import random
import re

import pytest

from gptedge.errors import UsageError
from gptedge.grammar.pattern import pattern_term
from gptedge.grammar.terms import Terms
from tests.grammar.conftest import drawn, holds

PATTERNS = [
    "",
    "a",
    "^a$",
    "^ab|cd$",
    "^(ab|c)*$",
    "^(?:a|b(?<name>c)?)+d?$",
    "^a{2}b{1,3}c{0,}$",
    r"^[a-c]+[^a-c]$",
    r"^[\w-]+\.[a-z]{2,3}$",
    r"^\d{3}-\D\s\S$",
    r"^[\]\\^-]+$",
    r"^\x41\u0042[\x43-\x45]$",
    r"^\/\.\*\+\?\(\)\[\]\{\}\|\^\$$",
    r'^"\\\t\n$',
    "^[äöü]+é$",
    "^[🙂-🙄]$",
    "^.$",
    r"^[^\d]*?x$",
    "^$",
    "b$",
]
ALPHABET = 'abcdABCDE0123 .-_"\\\t\n/äüé🙂x^$()[]{}|*+?'


def quoted(text: str) -> bytes:
    """As it stands between a JSON string's quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()


def found(pattern: str, text: str) -> bool:
    """By Python, whose $ also stands before a last line break, and whose classes are not ASCII's by themselves."""
    return re.search(re.sub(r"(?<!\\)\$(?=$|\|)", r"\\Z", pattern.replace("?<", "?P<")), text, re.ASCII) is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_holds_what_python_finds(pattern: str) -> None:
    terms, rng = Terms(), random.Random(pattern)
    term = pattern_term(terms, pattern)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randrange(6))) for _ in range(300)]
    for text in texts:
        assert holds(terms, term, quoted(text)) == found(pattern, text), text
    texts = [json.loads(b'"' + made + b'"') for seed in range(20) if (made := drawn(terms, term, seed)) is not None]
    assert texts
    for text in texts:
        if any(c.isspace() or c == "\ufeff" for c in text if not c.isascii()):
            continue  # ECMA's \s and Python's differ there
        assert found(pattern, text), text
        for changed in (text[:-1], text[1:], text + "a", text.replace("a", "b", 1)):
            assert holds(terms, term, quoted(changed)) == found(pattern, changed), changed


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("a(b", r"a \( without its \) at character 4"),
        ("a)b", r"a \) without its \( at character 2"),
        ("[a", "an end too early"),
        ("a**", "nothing to repeat"),
        ("*a", "nothing to repeat"),
        ("a{2,1}", "a repetition that is not in order"),
        ("a{x}", "a { that is no repetition"),
        ("a{1", "a { that is no repetition"),
        ("(?=a)b", "looking ahead or behind"),
        ("(?<!a)b", "looking ahead or behind"),
        (r"(a)\1", r"\\1, which is not supported"),
        (r"\bword", r"\\b, which is not supported"),
        (r"\p{L}", r"\\p, which is not supported"),
        ("a^b", "in the middle"),
        ("(^a)", "inside a group"),
        ("[z-a]", "a range that is not in order"),
        (r"\x4", "without its 2 digits"),
        ("a\\", "an end too early"),
    ],
)
def test_what_cannot_be_read_is_refused(pattern: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        pattern_term(Terms(), pattern)
