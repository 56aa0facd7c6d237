"""Added tokens: strings such as <|im_start|> that are found in text before anything else and never cut.

Does: Hugging Face's two passes (tokens with `normalized: false` in the raw text, the others in the normalized text),
leftmost-longest matching, lstrip, rstrip and single_word, and Hugging Face's own numbering of ids.
Does not: believe the `id` written in the file. Like `tokenizers`, it takes the model's id for a token that the
vocabulary holds, and the next free one otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gptedge.errors import TokenizerError
from gptedge.tokenizer.fields import field
from gptedge.tokenizer.normalize import Normalizer
from gptedge.tokenizer.pretokenize import compile_own
from gptedge.tokenizer.unicode_tables import RUST_WORD, SPACES, hide

_WHERE = "added_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class AddedToken:
    """One added token. `surface` is what is searched for and decoded: the content, normalized if `normalized`."""

    id: int
    content: str
    surface: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class Matcher:
    """Finds the tokens of one pass in a text."""

    def __init__(self, tokens: list[AddedToken]) -> None:
        self._by_surface = {t.surface: t for t in reversed(tokens) if t.surface}
        longest_first = sorted(self._by_surface, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def split(self, text: str, *, parse_special: bool) -> Iterator[tuple[int | None, str, int]]:
        """(id, matched text, start) for a token and (None, text, start) for what lies between; start in characters."""
        done = 0
        for start, end, token in self._matches(text, parse_special=parse_special):
            begin = max(_start_of_spaces(text, start), done) if token.lstrip else start
            if done < begin:
                yield None, text[done:begin], done
            yield token.id, text[begin:end], begin
            done = end
        if done != len(text):
            yield None, text[done:], done

    def _matches(self, text: str, *, parse_special: bool) -> Iterator[tuple[int, int, AddedToken]]:
        if self._pattern is None:
            return
        for m in self._pattern.finditer(text):
            token = self._by_surface[m[0]]
            if token.special and not parse_special:
                continue
            if token.single_word and not _stands_alone(text, *m.span()):
                continue
            yield m.start(), _end_of_spaces(text, m.end()) if token.rstrip else m.end(), token


def _start_of_spaces(text: str, end: int) -> int:
    while end and text[end - 1] in SPACES:
        end -= 1
    return end


def _end_of_spaces(text: str, start: int) -> int:
    while start < len(text) and text[start] in SPACES:
        start += 1
    return start


def _stands_alone(text: str, start: int, end: int) -> bool:
    return not (_is_word(text[start - 1 : start]) or _is_word(text[end : end + 1]))


def _is_word(character: str) -> bool:
    return bool(character) and compile_own(f"[{RUST_WORD}]").match(hide(character)) is not None


def read_added_tokens(
    entries: Any, vocab: Mapping[str, int], normalizer: Normalizer | None
) -> tuple[dict[int, AddedToken], dict[str, int]]:
    """Tokens by id and ids by content. Raises TokenizerError where an entry is not an added token."""
    by_id: dict[int, AddedToken] = {}
    ids: dict[str, int] = {}
    free = len(vocab)
    for entry in entries:
        content, flags = _read(entry)
        if not content:
            continue
        if content not in vocab and content not in ids:
            ids[content] = free
            free += 1
        token_id = ids.setdefault(content, vocab.get(content, free))
        surface = normalizer(content, True)[0] if normalizer is not None and flags["normalized"] else content
        flags["special"] |= token_id in by_id and by_id[token_id].special  # once special, always special
        by_id[token_id] = AddedToken(id=token_id, content=content, surface=surface, **flags)
    return by_id, ids


def _read(entry: Any) -> tuple[str, dict[str, bool]]:
    if not isinstance(entry, dict):
        raise TokenizerError(f"{_WHERE}: {entry!r} is not an object")
    field(entry, "id", int, _WHERE)
    content = field(entry, "content", str, _WHERE)
    return content, {name: field(entry, name, bool, f"{_WHERE} {content!r}") for name in _FLAGS}
