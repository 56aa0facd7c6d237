"""The shapes of OpenAI's answers: chat completions, text completions, models. Data only; `transport` sends it.

A streamed answer is `opening`, then a `piece` for each piece of text, an `ending` with the finish reason, and, when
asked, the usage. A whole answer has it all in one object.
"""

from __future__ import annotations

import codecs
import math
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from gptedge import __version__
from gptedge.errors import TokenizerError
from gptedge.runtime.generate import FinishReason, Result, Timings, Usage
from gptedge.runtime.sampling import TokenLogprob
from gptedge.tokenizer import Tokenizer

Json = dict[str, Any]
_LEAST_LOGPROB = -9999.0  # OpenAI's number for "next to never"; JSON has no infinity


@dataclass(frozen=True)
class Source:
    """Where answers come from: the model's name, and what its tokens are."""

    model: str
    tokenizer: Tokenizer
    eos_ids: frozenset[int]

    def of_text(self, result: Result) -> list[Placed] | None:
        """The log-probabilities of a whole reply's text."""
        return None if result.logprobs is None else OfText(self).take(result.text, result.logprobs)

    def token_bytes(self, token_id: int) -> bytes | None:
        """None for rows that pad the vocabulary, which no text has."""
        try:
            return self.tokenizer.token_bytes(token_id)
        except TokenizerError:
            return None

    def shown_bytes(self, token_id: int) -> bytes:
        """Those that a reply's text has of a token."""
        return b"" if token_id in self.tokenizer.special_ids else self.token_bytes(token_id) or b""

    def token_text(self, token_id: int) -> str:
        """The token as text, U+FFFD for bytes that are only part of a character."""
        return (self.token_bytes(token_id) or b"").decode("utf-8", "replace")


class Placed(NamedTuple):
    """A token, and which character of the reply it begins with, or goes on with."""

    begin: int
    token: TokenLogprob


class OfText:
    """Gives out the log-probabilities of a reply with the text that they belong to.

    A token belongs to the text in which its own begins. That which ends the reply, and those of a stop string, belong
    to none; one of which a stop string took only a part stays.
    """

    def __init__(self, source: Source) -> None:
        self._source, self._decoder = source, source.tokenizer.decode_stream()
        self._held: list[Placed] = []
        self._decoded = self._given = 0
        self._waiting = b""  # what the text has none of yet, such as a part of a character

    def take(self, text: str, logprobs: Iterable[TokenLogprob] | None) -> list[Placed]:
        """Those that belong to the text so far, `text` being the next piece of it, and have not been given out yet."""
        for token in logprobs or ():
            if token.token_id not in self._source.eos_ids:
                self._held.append(Placed(self._place(token.token_id), token))
        self._given += len(text)
        mine = [placed for placed in self._held if placed.begin < self._given]
        self._held = self._held[len(mine) :]
        return mine

    def _place(self, token_id: int) -> int:
        """Decode a token; the character of the text that it begins with, or goes on with."""
        waiting, data = self._waiting, self._source.shown_bytes(token_id)
        # Decoded as far as the token's first byte, what waits ends with that byte's character, or its U+FFFD so far.
        begin = self._decoded + max(len((waiting + data[:1]).decode("utf-8", "replace")) - 1, 0)
        text = self._decoder.step(token_id)
        self._decoded += len(text)
        self._waiting = _unfinished(waiting + data) if text else waiting + data
        if not self._decoded:  # a space that the text would begin with does not wait: many decoders drop it
            self._waiting = self._waiting.lstrip(b" ")
        return begin


def _unfinished(data: bytes) -> bytes:
    """The part of a character that `data` ends with."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return decoder.getstate()[0]


@dataclass(frozen=True)
class Head:
    """What every object of one answer begins with."""

    model: str
    id: str
    created: int

    def body(self, kind: str, choices: list[Json], **more: Any) -> Json:
        fixed = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**fixed, "system_fingerprint": f"gptedge-{__version__}", "choices": choices, **more}


def new_head(model: str, prefix: str) -> Head:
    return Head(model, f"{prefix}-{secrets.token_hex(12)}", int(time.time()))


class Answer(Protocol):
    """How one route words an answer."""

    source: Source

    def opening(self) -> list[Json]: ...
    def piece(self, text: str, logprobs: Sequence[Placed] | None) -> Json: ...
    def ending(self, reason: FinishReason) -> Json: ...
    def usage_only(self, usage: Json) -> Json: ...
    def whole(self, result: Result) -> Json: ...


class ChatAnswer:
    """/v1/chat/completions"""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._head = new_head(source.model, "chatcmpl")

    def opening(self) -> list[Json]:
        return [self._chunk({"role": "assistant", "content": ""}, None, None)]

    def piece(self, text: str, logprobs: Sequence[Placed] | None) -> Json:
        return self._chunk({"content": text}, self._logprobs(logprobs), None)

    def ending(self, reason: FinishReason) -> Json:
        return self._chunk({}, None, reason)

    def usage_only(self, usage: Json) -> Json:
        return self._head.body("chat.completion.chunk", [], usage=usage)

    def whole(self, result: Result) -> Json:
        message = {"role": "assistant", "content": result.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": self._logprobs(self.source.of_text(result))}
        return self._head.body(
            "chat.completion",
            [choice | {"finish_reason": result.finish_reason}],
            usage=usage_of(result.usage, result.timings),
        )

    def _chunk(self, delta: Json, logprobs: Json | None, reason: FinishReason | None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._head.body("chat.completion.chunk", [choice])

    def _logprobs(self, logprobs: Sequence[Placed] | None) -> Json | None:
        if logprobs is None:
            return None
        content = [
            self._named(t.token_id, t.logprob) | {"top_logprobs": [self._named(*top) for top in t.top]}
            for _, t in logprobs
        ]
        return {"content": content, "refusal": None}

    def _named(self, token_id: int, logprob: float) -> Json:
        data = self.source.token_bytes(token_id)
        text = self.source.token_text(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": None if data is None else list(data)}


class TextAnswer:
    """/v1/completions"""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._head = new_head(source.model, "cmpl")

    def opening(self) -> list[Json]:
        return []

    def piece(self, text: str, logprobs: Sequence[Placed] | None) -> Json:
        return self._body(text, self._logprobs(logprobs), None)

    def ending(self, reason: FinishReason) -> Json:
        return self._body("", None, reason)

    def usage_only(self, usage: Json) -> Json:
        return self._head.body("text_completion", [], usage=usage)

    def whole(self, result: Result) -> Json:
        body = self._body(result.text, self._logprobs(self.source.of_text(result)), result.finish_reason)
        return body | {"usage": usage_of(result.usage, result.timings)}

    def _body(self, text: str, logprobs: Json | None, reason: FinishReason | None) -> Json:
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._head.body("text_completion", [choice])

    def _logprobs(self, logprobs: Sequence[Placed] | None) -> Json | None:
        if logprobs is None:
            return None
        tokens = [t for _, t in logprobs]
        return {
            "tokens": [self.source.token_text(t.token_id) for t in tokens],
            "token_logprobs": [finite(t.logprob) for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens] if any(t.top for t in tokens) else None,
            "text_offset": [begin for begin, _ in logprobs],
        }

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and the chosen one; of several that read alike, the likeliest."""
        named: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            named.setdefault(self.source.token_text(token_id), finite(logprob))
        return named


def usage_of(usage: Usage, timings: Timings | None) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": timings.cached_tokens if timings else 0, **_dropped(usage)},
    }


def _dropped(usage: Usage) -> Json:
    """An entry of ours, where a full context left something out."""
    return {"dropped_tokens": usage.dropped_tokens} if usage.dropped_tokens else {}


def model_object(name: str, created: int) -> Json:
    return {"id": name, "object": "model", "created": created, "owned_by": "gptedge"}


def finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB) if math.isfinite(logprob) else _LEAST_LOGPROB


MakeAnswer = Callable[[Source], Answer]
