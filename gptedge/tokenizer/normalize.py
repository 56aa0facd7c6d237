"""Normalizers: what happens to text before it is split.

Does: NFC, NFD, NFKC, NFKD, Lowercase, Strip, Prepend, Replace and Sequence, with the results of `tokenizers`, whose
normalization tables are Unicode 9 and whose lower-casing ignores context. Python's newer tables are held back by
treating characters that version 9 does not know as boundaries (unicode_tables.split_at_inert).
Does not: track offsets. Only "does this still begin where the original text began" is kept, because the Metaspace
pre-tokenizer asks for it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any, Literal

from gptedge.tokenizer.fields import Block, field, kind, pattern, unsupported
from gptedge.tokenizer.patterns import compile_pattern, find_spans
from gptedge.tokenizer.unicode_tables import LOWERCASE, SPACES, hide, split_at_inert

# Text and "begins at the original's first character", and the same after normalization.
Normalizer = Callable[[str, bool], tuple[str, bool]]
_WHERE = "normalizer"


def build_normalizer(block: Any) -> Normalizer | None:
    """The normalizer of a tokenizer.json block; None for null. Raises TokenizerError naming what is not supported."""
    if block is None:
        return None
    name = kind(block, _WHERE)
    if name not in _KINDS:
        raise unsupported(_WHERE, name)
    return _KINDS[name](block)


def _sequence(block: Block) -> Normalizer:
    steps = [build_normalizer(b) for b in field(block, "normalizers", list, "normalizer Sequence")]
    chain = [step for step in steps if step is not None]

    def run(text: str, first: bool) -> tuple[str, bool]:
        for step in chain:
            text, first = step(text, first)
        return text, first

    return run


def _unicode(form: Literal["NFC", "NFD", "NFKC", "NFKD"]) -> Callable[[Block], Normalizer]:
    def normalize(text: str) -> str:
        if text.isascii():
            return text
        parts = split_at_inert(text)
        parts[::2] = [unicodedata.normalize(form, part) for part in parts[::2]]
        return "".join(parts)

    return lambda block: _map(normalize)


def _lowercase(block: Block) -> Normalizer:
    return _map(lambda text: text.lower() if text.isascii() else text.translate(LOWERCASE).lower())


def _map(change: Callable[[str], str]) -> Normalizer:
    return lambda text, first: (change(text), first)


def _strip(block: Block) -> Normalizer:
    left = field(block, "strip_left", bool, "normalizer Strip")
    right = field(block, "strip_right", bool, "normalizer Strip")

    def run(text: str, first: bool) -> tuple[str, bool]:
        if right:
            text = text.rstrip(SPACES)
        kept = text.lstrip(SPACES) if left else text
        return kept, first and len(kept) == len(text)

    return run


def _prepend(block: Block) -> Normalizer:
    prefix = field(block, "prepend", str, "normalizer Prepend")
    return lambda text, first: (prefix + text if text else text, first)


def _replace(block: Block) -> Normalizer:
    content = field(block, "content", str, "normalizer Replace")
    change = replacer(block, "normalizer Replace")
    compiled = compile_pattern(*pattern(block, "normalizer Replace"))

    def run(text: str, first: bool) -> tuple[str, bool]:
        if first and (m := compiled.match(hide(text))) is not None and m.end() > 0:
            first = m.end() == 1 and content != ""  # the new text is aligned to the last character it replaced
        return change(text), first

    return run


def replacer(block: Block, where: str) -> Callable[[str], str]:
    """Replace every match of the block's `pattern` by its `content`, which is plain text. Used by the decoder too."""
    content = field(block, "content", str, where)
    text_or_regex, is_regex = pattern(block, where)
    if not is_regex and text_or_regex:
        return lambda text: text.replace(text_or_regex, content)
    compiled = compile_pattern(text_or_regex, is_regex)

    def run(text: str) -> str:
        spans = find_spans(compiled, hide(text)) if text else []
        return "".join(content if matched else text[start:end] for start, end, matched in spans)

    return run


_KINDS: dict[str, Callable[[Block], Normalizer]] = {
    "Sequence": _sequence,
    "NFC": _unicode("NFC"),
    "NFD": _unicode("NFD"),
    "NFKC": _unicode("NFKC"),
    "NFKD": _unicode("NFKD"),
    "Lowercase": _lowercase,
    "Strip": _strip,
    "Prepend": _prepend,
    "Replace": _replace,
}
