"""Pre-tokenizers: cutting normalized text into the words that BPE works on.

Does: ByteLevel, Split, Digits, Metaspace, Whitespace, WhitespaceSplit, Punctuation and Sequence.
Does not: write bytes as characters when ByteLevel comes last; `PreTokenizer.byte_level` tells the model to, which then
does it once per distinct word instead of once per occurrence.

Between the first step and the words that come out, text is disguised (unicode_tables.disguise).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptedge.errors import TokenizerError
from gptedge.tokenizer.fields import Block, choice, field, kind, pattern, unsupported
from gptedge.tokenizer.patterns import BEHAVIORS, GPT2_PATTERN, behave, compile_pattern, find_spans, isolate
from gptedge.tokenizer.unicode_tables import NUMERIC, PUNCTUATION, RUST_WORD, WHITESPACE, disguise

# Pieces, and whether the first one begins at the first character of the original text; the same afterwards.
Step = Callable[[list[str], bool], tuple[list[str], bool]]
_WHERE = "pre_tokenizer"


def _byte_characters() -> dict[int, str]:
    """GPT-2's visible character for each byte: itself where printable in Latin-1, else U+0100 and on, in order."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(0x100 + i) for i, b in enumerate(others)}


BYTE_TO_CHAR = _byte_characters()
CHAR_TO_BYTE = {ord(c): b for b, c in BYTE_TO_CHAR.items()}


def bytes_as_characters(text: str) -> str:
    """The UTF-8 bytes of `text`, one visible character each."""
    return text.encode().decode("latin-1").translate(BYTE_TO_CHAR)


@dataclass(frozen=True)
class PreTokenizer:
    """Steps to run in order, and whether the model must write the words' bytes as characters."""

    steps: tuple[Step, ...]
    byte_level: bool

    def __call__(self, text: str, first: bool = True) -> list[str]:
        """Words of `text`, none empty. `first`: the text begins where the original text began."""
        disguised, undo = disguise(text)
        pieces = [disguised] if text else []
        for step in self.steps:
            if undo and step is _write_bytes:  # bytes must be those of the original; no unknown character is left then
                pieces, undo = [p.translate(undo) for p in pieces], {}
            pieces, first = step(pieces, first)
        return [p.translate(undo) for p in pieces] if undo else pieces


def build_pre_tokenizer(block: Any) -> PreTokenizer:
    """The pre-tokenizer of a tokenizer.json block. Raises TokenizerError naming what is not supported."""
    steps = _steps(block) if block is not None else []
    byte_level = bool(steps) and steps[-1] is _write_bytes
    return PreTokenizer(tuple(steps[:-1] if byte_level else steps), byte_level)


def _steps(block: Any) -> list[Step]:
    name = kind(block, _WHERE)
    if name == "Sequence":
        blocks = field(block, "pretokenizers", list, "pre_tokenizer Sequence")
        return [step for b in blocks for step in _steps(b)]
    if name not in _KINDS:
        raise unsupported(_WHERE, name)
    return _KINDS[name](block)


def _byte_level(block: Block) -> list[Step]:
    steps: list[Step] = []
    if field(block, "add_prefix_space", bool, "pre_tokenizer ByteLevel"):
        steps.append(lambda pieces, first: ([p if p.startswith(" ") else " " + p for p in pieces], first))
    if field(block, "use_regex", bool, "pre_tokenizer ByteLevel", True):
        steps.append(_isolated(compile_pattern(GPT2_PATTERN)))
    return [*steps, _write_bytes]


def _write_bytes(pieces: list[str], first: bool) -> tuple[list[str], bool]:
    return [bytes_as_characters(p) for p in pieces], first


def _split(block: Block) -> list[Step]:
    where = "pre_tokenizer Split"
    compiled = compile_pattern(*pattern(block, where))
    behavior = choice(block, "behavior", BEHAVIORS, where, "")
    invert = field(block, "invert", bool, where)
    if behavior == "Isolated":
        return [_isolated(compiled)]
    return [_by_behavior(compiled, behavior, invert)]


def _isolated(compiled: Any) -> Step:
    return lambda pieces, first: (isolate(compiled, pieces), first)


def _by_behavior(compiled: Any, behavior: str, invert: bool) -> Step:
    def run(pieces: list[str], first: bool) -> tuple[list[str], bool]:
        words = []
        begins = first
        for i, piece in enumerate(pieces):
            spans = find_spans(compiled, piece)
            if invert:
                spans = [(start, end, not matched) for start, end, matched in spans]
            kept = [(start, end) for start, end in behave(behavior, spans) if start != end]
            words += [piece[start:end] for start, end in kept]
            if i == 0:
                begins = first and bool(kept) and kept[0][0] == 0
        return words, begins

    return run


def _digits(block: Block) -> list[Step]:
    one_by_one = field(block, "individual_digits", bool, "pre_tokenizer Digits")
    return [_isolated(compile_own(f"{NUMERIC}{'' if one_by_one else '+'}|[^{NUMERIC}]+"))]


def _punctuation(block: Block) -> list[Step]:
    behavior = choice(block, "behavior", BEHAVIORS, "pre_tokenizer Punctuation", "Isolated")
    return [_by_behavior(compile_own(PUNCTUATION), behavior, invert=False)]


def _whitespace(block: Block) -> list[Step]:
    words = rf"[{RUST_WORD}]+|[^{RUST_WORD}\p{{White_Space}}]+"
    return [_by_behavior(compile_own(words), "Removed", invert=True)]


def _whitespace_split(block: Block) -> list[Step]:
    return [_by_behavior(compile_own(WHITESPACE), "Removed", invert=False)]


def _metaspace(block: Block) -> list[Step]:
    where = "pre_tokenizer Metaspace"
    mark = metaspace_mark(block, where)
    scheme = metaspace_scheme(block, where)
    split = field(block, "split", bool, where, True)
    # A mark begins a new word and stays with what follows it.
    words = compile_own(f"{mark_class(mark)}?{mark_class(mark, '^')}+|{mark_class(mark)}")

    def run(pieces: list[str], first: bool) -> tuple[list[str], bool]:
        pieces = [piece.replace(" ", mark) for piece in pieces]
        if scheme != "never":
            marked = len(pieces) if scheme == "always" else int(first)
            pieces[:marked] = [p if p.startswith(mark) else mark + p for p in pieces[:marked]]
        return [w for piece in pieces for w in words.findall(piece)] if split else pieces, first

    return [run]


def mark_class(mark: str, prefix: str = "") -> str:
    """A regular expression class of the one character `mark`, or of all others."""
    return f"[{prefix}\\U{ord(mark):08X}]"


def metaspace_mark(block: Block, where: str) -> str:
    """The character that stands for a space."""
    mark = field(block, "replacement", str, where)
    if len(mark) != 1:
        raise TokenizerError(f"{where}: 'replacement' is {mark!r}, and one character is needed")
    return str(mark)


def metaspace_scheme(block: Block, where: str) -> str:
    """always, first or never; files from before `prepend_scheme` say `add_prefix_space` instead."""
    scheme = choice(block, "prepend_scheme", ("always", "first", "never"), where, "always")
    if field(block, "add_prefix_space", bool, where, True):
        return scheme
    if scheme != "never":
        raise TokenizerError(f"{where}: 'add_prefix_space' is false, and 'prepend_scheme' is {scheme!r}")
    return "never"


def compile_own(pattern_text: str) -> Any:
    """Compile a pattern of this package, which is written for the `regex` module already."""
    import regex

    return regex.compile(pattern_text, regex.V1)


_KINDS: dict[str, Callable[[Block], list[Step]]] = {
    "ByteLevel": _byte_level,
    "Split": _split,
    "Digits": _digits,
    "Metaspace": _metaspace,
    "Whitespace": _whitespace,
    "WhitespaceSplit": _whitespace_split,
    "Punctuation": _punctuation,
}
