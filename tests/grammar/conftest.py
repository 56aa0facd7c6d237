"""Walking through languages: what a text leads to, and texts drawn at random."""

from __future__ import annotations

import random

from gptedge.grammar.terms import END, NOTHING, Term, Terms


def holds(terms: Terms, term: Term, text: bytes | str) -> bool:
    return terms.holds(term, text.encode() if isinstance(text, str) else text)


def drawn(terms: Terms, term: Term, seed: int, most: int = 400) -> bytes | None:
    """A text of the language, byte by byte; None where it had not come to its end after `most` bytes."""
    rng, text = random.Random(seed), bytearray()
    while len(text) < most:
        following = [b for b in range(256) if terms.after(term, b) != NOTHING]
        if terms.may_end(term) and (term == END or not following or rng.random() < 0.3):
            return bytes(text)
        assert following, "a language that has no way on, and no end"
        likely = [b for b in following if b in b'abcd",}]']
        text.append(rng.choice(likely if likely and rng.random() < 0.7 else following))
        term = terms.after(term, text[-1])
    return None
