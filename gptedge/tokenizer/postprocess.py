"""Post-processors: special tokens around the ids of one text.

Does: TemplateProcessing and Sequence; ByteLevel is accepted and changes no id. Does not: pairs of texts, offsets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gptedge.errors import TokenizerError
from gptedge.tokenizer.fields import Block, field, kind, unsupported

# Ids, and whether special tokens are to be added; the ids to return.
PostProcessor = Callable[[list[int], bool], list[int]]
_WHERE = "post_processor"


def build_post_processor(block: Any) -> PostProcessor:
    """The post-processor of a tokenizer.json block. Raises TokenizerError naming what is not supported."""
    if block is None:
        return _unchanged
    name = kind(block, _WHERE)
    if name not in _KINDS:
        raise unsupported(_WHERE, name)
    return _KINDS[name](block)


def _unchanged(ids: list[int], add_special_tokens: bool) -> list[int]:
    return ids


def _sequence(block: Block) -> PostProcessor:
    blocks = field(block, "processors", list, "post_processor Sequence")
    steps = [build_post_processor(b) for b in blocks]
    if sum(kind(b, _WHERE) == "TemplateProcessing" for b in blocks) > 1:
        raise TokenizerError("post_processor Sequence: more than one TemplateProcessing is not supported")

    def run(ids: list[int], add_special_tokens: bool) -> list[int]:
        for step in steps:
            ids = step(ids, add_special_tokens)
        return ids

    return run


def _template(block: Block) -> PostProcessor:
    where = "post_processor TemplateProcessing"
    tokens = field(block, "special_tokens", dict, where, {})
    pieces = [_piece(p, tokens, where) for p in field(block, "single", list, where)]

    def run(ids: list[int], add_special_tokens: bool) -> list[int]:
        out: list[int] = []
        for piece in pieces:
            if piece is None:
                out += ids
            elif add_special_tokens:
                out += piece
        return out

    return run


def _piece(piece: Any, tokens: Block, where: str) -> list[int] | None:
    """The ids of a special token's place in the template; None for the place of the text."""
    if isinstance(piece, dict) and isinstance(piece.get("Sequence"), dict) and piece["Sequence"].get("id") == "A":
        return None
    if isinstance(piece, dict) and isinstance(piece.get("SpecialToken"), dict):
        name = field(piece["SpecialToken"], "id", str, where)
        ids = field(field(tokens, name, dict, f"{where} special_tokens"), "ids", list, f"{where} {name!r}")
        if all(type(i) is int for i in ids):
            return list(ids)
    raise TokenizerError(f"{where}: the piece {piece!r} in 'single' cannot be used")


_KINDS: dict[str, Callable[[Block], PostProcessor]] = {
    "ByteLevel": lambda block: _unchanged,
    "TemplateProcessing": _template,
    "Sequence": _sequence,
}
