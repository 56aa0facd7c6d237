"""Decoders: token strings back to text, one token at a time.

A decoder is a chain of stages. Each stage takes the next token and gives those that are now final, so that a reply can
be decoded while it is generated:

    ids → tokens → [Replace] → [ByteFallback] → [Fuse] → [Strip] → text
                               holds a run of    from here on the
                               byte tokens       text is one token

Does: ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace, Sequence, and no decoder (tokens joined by spaces).
Does not: clean up spaces as `transformers` may do after `tokenizers`.

What arrives late: a stage that sees the whole text as one token and needs its end (Replace, or Strip at the end, after
Fuse) holds everything until `finish`; ByteFallback holds a run of byte tokens until another token ends it, because one
wrong byte makes the whole run U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

from gptedge.errors import TokenizerError
from gptedge.tokenizer.fields import Block, field, kind, unsupported
from gptedge.tokenizer.normalize import replacer
from gptedge.tokenizer.pretokenize import CHAR_TO_BYTE, metaspace_mark, metaspace_scheme

_WHERE = "decoder"
_REPLACEMENT = "\ufffd"


class Stage(Protocol):
    """One decoder, with the state of one text."""

    def push(self, token: str) -> list[str]:
        """Take one token; give the tokens that are final."""

    def finish(self) -> list[str]:
        """Give what was held back. The stage is not used afterwards."""


MakeStage = Callable[[], Stage]


class Decoder:
    """The decoder of one tokenizer.json; `stream()` starts one text."""

    def __init__(self, block: Any) -> None:
        self._makers = _makers(block)
        kinds = [kind(b, _WHERE) for b in _flatten(block)]
        self._only_bytes = kinds == ["ByteLevel"]
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._replacers = [replacer(b, "decoder Replace") for b in _flatten(block) if kind(b, _WHERE) == "Replace"]
        self._spaces = [metaspace_mark(b, _WHERE) for b in _flatten(block) if kind(b, _WHERE) == "Metaspace"]

    def decode(self, tokens: list[str]) -> str:
        """Text of all tokens at once; for bytes alone, one join is 5 times faster than the stages."""
        if self._only_bytes:
            return b"".join(map(bytes_of, tokens)).decode("utf-8", "replace")
        chain = self.stream()
        return "".join([*map(chain.push, tokens), chain.finish()])

    def stream(self) -> Chain:
        return Chain([make() for make in self._makers])

    def token_bytes(self, token: str) -> bytes:
        """The bytes that `token` stands for inside a text; what only happens at a text's ends is left out."""
        if self._byte_level:
            return bytes_of(token)
        for replace in self._replacers:
            token = replace(token)
        for mark in self._spaces:
            token = token.replace(mark, " ")
        byte = byte_of(token) if self._byte_fallback else None
        return token.encode() if byte is None else bytes([byte])


class Chain:
    """Stages in a row."""

    def __init__(self, stages: list[Stage]) -> None:
        self._stages = stages

    def push(self, token: str) -> str:
        """Text that is final once `token` is known."""
        return _through([token], self._stages)

    def finish(self) -> str:
        """Text that was held back."""
        return "".join(_through(stage.finish(), self._stages[i + 1 :]) for i, stage in enumerate(self._stages))


def _through(tokens: list[str], stages: list[Stage]) -> str:
    for stage in stages:
        tokens = [out for token in tokens for out in stage.push(token)] if len(tokens) != 1 else stage.push(tokens[0])
    return "".join(tokens)


@lru_cache(maxsize=1 << 17)
def bytes_of(token: str) -> bytes:
    """Bytes of a byte-level token; a token with a character outside GPT-2's alphabet stands for its own UTF-8."""
    try:
        return bytes(map(CHAR_TO_BYTE.__getitem__, map(ord, token)))
    except KeyError:
        return token.encode()


def byte_of(token: str) -> int | None:
    """The byte of a token such as <0x0A>, read as Rust reads it: a sign counts as a digit's place."""
    if len(token) != 6 or len(token.encode()) != 6 or not (token.startswith("<0x") and token.endswith(">")):
        return None
    digits = token[3:5]
    if digits[0] == "+":
        digits = digits[1:]
    return int(digits, 16) if all(c in "0123456789abcdefABCDEF" for c in digits) else None


class _EachToken:
    """A stage that changes every token by itself."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self._change = change

    def push(self, token: str) -> list[str]:
        return [self._change(token)]

    def finish(self) -> list[str]:
        return []


class _JoinWithSpaces:
    """No decoder at all: Hugging Face puts a space between tokens."""

    def __init__(self) -> None:
        self._gap = ""

    def push(self, token: str) -> list[str]:
        token, self._gap = self._gap + token, " "
        return [token]

    def finish(self) -> list[str]:
        return []


class _ByteLevel:
    """Bytes to UTF-8; an incomplete character waits for its remaining bytes."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> list[str]:
        return [self._utf8.decode(bytes_of(token))]

    def finish(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]


class _ByteFallback:
    """Runs of <0xNN>: UTF-8 where the whole run is valid, else U+FFFD for each byte of it."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, token: str) -> list[str]:
        byte = byte_of(token)
        if byte is None:
            return [*self.finish(), token]
        self._run.append(byte)
        return []

    def finish(self) -> list[str]:
        run, self._run = self._run, bytearray()
        if not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return [_REPLACEMENT] * len(run)


class _Metaspace:
    """The mark back to a space; in the first token it vanishes, if it was put there."""

    def __init__(self, mark: str, first: str) -> None:
        self._mark = mark
        self._space = first

    def push(self, token: str) -> list[str]:
        token, self._space = token.replace(self._mark, self._space), " "
        return [token]

    def finish(self) -> list[str]:
        return []


class _StripStart:
    """Strip at the start of a text that comes in parts."""

    def __init__(self, content: str, count: int) -> None:
        self._content = content
        self._left = count

    def push(self, token: str) -> list[str]:
        while self._left and token:
            if not token.startswith(self._content):
                self._left = 0
                break
            token = token[1:]
            self._left -= 1
        return [token]

    def finish(self) -> list[str]:
        return []


class _Whole:
    """Any other stage behind a Fuse: collects the text and shows it to the stage as one token."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._parts: list[str] = []

    def push(self, token: str) -> list[str]:
        self._parts.append(token)
        return []

    def finish(self) -> list[str]:
        return [*self._stage.push("".join(self._parts)), *self._stage.finish()]


def _strip_each(content: str, start: int, stop: int) -> Callable[[str], str]:
    def change(token: str) -> str:
        begin, end = 0, len(token)
        while begin < min(start, len(token)) and token[begin] == content:
            begin += 1
        while end > max(len(token) - stop, 0) and token[end - 1] == content:
            end -= 1
        return token[begin:end]

    return change


def _flatten(block: Any) -> list[Block]:
    """A decoder block without its Sequences."""
    if block is None:
        return []
    if kind(block, _WHERE) != "Sequence":
        return [block]
    return [inner for b in field(block, "decoders", list, "decoder Sequence") for inner in _flatten(b)]


def _makers(block: Any) -> list[MakeStage]:
    """Makers of the stages of a block; behind Fuse or ByteLevel the text is one token that comes in parts."""
    if block is None:
        return [_JoinWithSpaces]
    makers: list[MakeStage] = []
    fused = False
    for b in _flatten(block):
        name = kind(b, _WHERE)
        if name not in _KINDS:
            raise unsupported(_WHERE, name)
        if name != "Fuse":
            makers.append(_KINDS[name](b, fused))
        fused = fused or name in ("Fuse", "ByteLevel")
    return makers


def _make_each(change: Callable[[str], str], fused: bool) -> MakeStage:
    return (lambda: _Whole(_EachToken(change))) if fused else (lambda: _EachToken(change))


def _make_plain(stage: MakeStage) -> Callable[[Block, bool], MakeStage]:
    return lambda block, fused: (lambda: _Whole(stage())) if fused else stage


def _make_strip(block: Block, fused: bool) -> MakeStage:
    where = "decoder Strip"
    content = field(block, "content", str, where)
    start, stop = field(block, "start", int, where), field(block, "stop", int, where)
    if len(content) != 1 or start < 0 or stop < 0:
        raise TokenizerError(
            f"{where}: one character and counts from 0 on are needed, not {content!r}, {start}, {stop}"
        )
    if fused and stop == 0:
        return lambda: _StripStart(content, start)
    return _make_each(_strip_each(content, start, stop), fused)


def _make_metaspace(block: Block, fused: bool) -> MakeStage:
    mark = metaspace_mark(block, "decoder Metaspace")
    first = " " if metaspace_scheme(block, "decoder Metaspace") == "never" else ""
    return (lambda: _Whole(_Metaspace(mark, first))) if fused else (lambda: _Metaspace(mark, first))


_KINDS: dict[str, Callable[[Block, bool], MakeStage]] = {
    "ByteLevel": _make_plain(_ByteLevel),
    "ByteFallback": _make_plain(_ByteFallback),
    "Replace": lambda block, fused: _make_each(replacer(block, "decoder Replace"), fused),
    "Strip": _make_strip,
    "Metaspace": _make_metaspace,
    "Fuse": _make_plain(_JoinWithSpaces),  # only named here: _makers leaves it out
}
