"""Oniguruma patterns, as tokenizer.json holds them, run by the `regex` module with the same matches.

Does: rewrites what the two engines read differently (classes pinned to Unicode 16, `^ $ \\z \\Z \\h`, literals that are
set operators here) and finds matches with Oniguruma's rule for empty ones.
Does not: guess. A construct that cannot be rewritten safely is refused by name. Known difference: under `(?i)` the
`regex` module lets U+0130 match `i`, Oniguruma does not; no tokenizer's pattern is known to ask.

Text must have gone through `unicode_tables.disguise` or `hide`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import regex

from gptedge.errors import TokenizerError
from gptedge.tokenizer.unicode_tables import ONIG_WORD, ONIG_WORD_IN_CLASS, WHITESPACE

Span = tuple[int, int, bool]  # start, end, whether the pattern matched there

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")

# Escapes that mean something else in the other engine: outside a class, and inside one.
_OUTSIDE = {
    "s": WHITESPACE, "S": r"\P{White_Space}", "d": r"\p{Nd}", "D": r"\P{Nd}", "e": r"\x1B",
    "w": f"[{ONIG_WORD}]", "W": f"[^{ONIG_WORD}]", "h": "[0-9A-Fa-f]", "H": "[^0-9A-Fa-f]",
    "A": r"\A", "z": r"\Z", "Z": r"(?=\n?\Z)",
    "b": f"(?:(?<=[{ONIG_WORD}])(?![{ONIG_WORD}])|(?<![{ONIG_WORD}])(?=[{ONIG_WORD}]))",
    "B": f"(?:(?<=[{ONIG_WORD}])(?=[{ONIG_WORD}])|(?<![{ONIG_WORD}])(?![{ONIG_WORD}]))",
}  # fmt: skip
_INSIDE = {
    **_OUTSIDE, "w": ONIG_WORD_IN_CLASS, "W": f"[^{ONIG_WORD_IN_CLASS}]", "h": "0-9A-Fa-f", "b": r"\x08",
    "A": "", "z": "", "Z": "", "B": "",
}  # fmt: skip
_SAME = frozenset("nrtfva")  # control characters, spelled alike
_GROUPS = ("(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:", "(?-i:", "(?i-mx:")
# U+0295 was a lower-case letter until version 16 and is an "other letter" since.
_CATEGORIES = {
    "Ll": (r"\p{Ll}\u0295", r"[^\p{Ll}\u0295]"),
    "Lo": (r"[\p{Lo}--\u0295]", r"[^[\p{Lo}--\u0295]]"),
}


@cache
def compile_pattern(pattern: str, is_regex: bool = True) -> Any:
    """A compiled `regex` pattern. Raises TokenizerError for what is not supported or not a pattern."""
    try:
        return regex.compile(_Translation(pattern).run() if is_regex else regex.escape(pattern), _FLAGS)
    except regex.error as e:
        raise TokenizerError(f"pattern {pattern!r} is not a regular expression: {e}") from e


_FLAGS = regex.V1 | regex.MULTILINE


def find_spans(compiled: Any, text: str) -> list[Span]:
    """Matches and the gaps between them, covering `text`; an empty match right after another match does not count."""
    spans: list[Span] = []
    done = 0
    last_end = -1
    for m in compiled.finditer(text):
        start, end = m.span()
        if start == end == last_end:
            continue
        if done != start:
            spans.append((done, start, False))
        spans.append((start, end, True))
        done = last_end = end
    if done != len(text):
        spans.append((done, len(text), False))
    return spans


def isolate(compiled: Any, pieces: list[str]) -> list[str]:
    """Matches and gaps of each piece as strings, none empty. `findall` is 3 times faster where matches leave no gap."""
    if not compiled.groups:
        findall = compiled.findall
        words = [word for piece in pieces for word in findall(piece)] if len(pieces) != 1 else findall(pieces[0])
        if sum(map(len, words)) == sum(map(len, pieces)):
            return words if all(words) else [w for w in words if w]
    return [p[start:end] for p in pieces for start, end, _ in find_spans(compiled, p) if start != end]


def behave(behavior: str, spans: list[Span]) -> list[tuple[int, int]]:
    """What `SplitDelimiterBehavior` makes of the spans: the ranges that stay, in order."""
    return _BEHAVIORS[behavior](spans)


def _removed(spans: list[Span]) -> list[tuple[int, int]]:
    return [(start, end) for start, end, matched in spans if not matched]


def _isolated(spans: list[Span]) -> list[tuple[int, int]]:
    return [(start, end) for start, end, _ in spans]


def _contiguous(spans: list[Span]) -> list[tuple[int, int]]:
    return _join(spans, lambda before, now: before == now)


def _merged_with_previous(spans: list[Span]) -> list[tuple[int, int]]:
    return _join(spans, lambda before, now: now and not before)


def _merged_with_next(spans: list[Span]) -> list[tuple[int, int]]:
    return _join(spans, lambda now, after: now and not after)


def _join(spans: list[Span], joins: Callable[[bool, bool], bool]) -> list[tuple[int, int]]:
    """Cut between neighbours unless `joins(left matched, right matched)`."""
    if not spans:
        return []
    cuts = [not joins(left[2], right[2]) for left, right in pairwise(spans)]
    starts = [spans[0][0], *(s[0] for s, cut in zip(spans[1:], cuts, strict=True) if cut)]
    return list(zip(starts, [*starts[1:], spans[-1][1]], strict=True))


_BEHAVIORS = {
    "Removed": _removed,
    "Isolated": _isolated,
    "Contiguous": _contiguous,
    "MergedWithPrevious": _merged_with_previous,
    "MergedWithNext": _merged_with_next,
}
BEHAVIORS = tuple(_BEHAVIORS)


class _Translation:
    """One pass over a pattern; `self.at` is the next character to read."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def run(self) -> str:
        if "(?i" in self.pattern and not self.pattern.isascii():
            raise self._refuse("(?i) with letters outside ASCII, whose foldings differ,")
        out = []
        while self.at < len(self.pattern):
            out.append(self._outside())
        return "".join(out)

    def _outside(self) -> str:
        c = self.pattern[self.at]
        if c == "\\":
            return self._escape(_OUTSIDE, inside=False)
        if c == "[":
            return self._class()
        if c == "(":
            self._check_group()
        if c == "}" and self.pattern[self.at + 1 : self.at + 2] in ("+", "?"):
            raise self._refuse("'" + self.pattern[self.at : self.at + 2] + "' after an interval")
        self.at += 1
        return r"(?:\A|^(?!\Z))" if c == "^" else c

    def _check_group(self) -> None:
        """Only groups that both engines read alike; a bare (?i) only as the first thing."""
        if not self.pattern.startswith("(?", self.at) or self.pattern.startswith(_GROUPS, self.at):
            return
        if not (self.at == 0 and self.pattern.startswith("(?i)")):
            raise self._refuse(f"the group {self.pattern[self.at : self.at + 4]!r}")

    def _class(self) -> str:
        """A bracketed class, nested ones included."""
        out = ["["]
        self.at += 1
        if self.pattern.startswith("^", self.at):
            out.append("^")
            self.at += 1
        first = self.at
        while not (self.pattern.startswith("]", self.at) and self.at > first):
            if self.at >= len(self.pattern):
                raise self._refuse("a class without its ]")
            out.append(self._inside())
        self.at += 1
        return "".join([*out, "]"])

    def _inside(self) -> str:
        c = self.pattern[self.at]
        if c == "\\":
            return self._escape(_INSIDE, inside=True)
        if self.pattern.startswith("[:", self.at):
            raise self._refuse("a POSIX bracket")
        if self.pattern.startswith("--", self.at):
            raise self._refuse("'--' in a class")
        if c == "[":
            return self._class()
        if self.pattern.startswith("&&", self.at):
            self.at += 2
            return "&&"
        self.at += 1
        return "\\" + c if c in "~|&]{}" else c

    def _escape(self, table: dict[str, str], *, inside: bool) -> str:
        c = self.pattern[self.at + 1 : self.at + 2]
        if c in ("p", "P"):
            return self._property(inside=inside)
        if c in ("x", "u"):
            return self._code_point()
        if not c.isalnum() and c:
            self.at += 2
            return "\\" + c
        if c not in _SAME and not table.get(c):
            raise self._refuse(f"the escape \\{c}")
        self.at += 2
        return table.get(c, "\\" + c)

    def _property(self, *, inside: bool) -> str:
        end = self.pattern.find("}", self.at)
        if not self.pattern.startswith("{", self.at + 2) or end < 0:
            raise self._refuse(f"the escape {self.pattern[self.at : self.at + 3]!r}")
        text = self.pattern[self.at : end + 1]
        self.at = end + 1
        if text[3:-1] not in _CATEGORIES:
            return text
        plain, negated = _CATEGORIES[text[3:-1]]
        if text[1] == "P":
            return negated
        return plain if inside or plain.startswith("[") else f"[{plain}]"

    def _code_point(self) -> str:
        m = regex.compile(r"\\(?:x\{([0-9A-Fa-f]{1,6})\}|x([0-9A-Fa-f]{1,2})|u([0-9A-Fa-f]{4}))").match(
            self.pattern, self.at
        )
        if m is None:
            raise self._refuse(f"the escape {self.pattern[self.at : self.at + 3]!r}")
        self.at = m.end()
        return f"\\U{int(m[1] or m[2] or m[3], 16):08X}"

    def _refuse(self, what: str) -> TokenizerError:
        return TokenizerError(f"pattern {self.pattern!r}: {what} is not supported")
