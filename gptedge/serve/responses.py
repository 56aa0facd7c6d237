"""The shapes of OpenAI's answers: chat completions, text completions, models. Data only; `transport` sends it.

A streamed answer is `opening`, then a `piece` for each piece of text, an `ending` with the finish reason, and, when
asked, the usage. A whole answer has it all in one object.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

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

    def of_text(self, result: Result) -> list[TokenLogprob] | None:
        """The log-probabilities of a whole reply's text."""
        return None if result.logprobs is None else OfText(self).take(result.text, result.logprobs)

    def token_bytes(self, token_id: int) -> bytes | None:
        """None for rows that pad the vocabulary, which no text has."""
        try:
            return self.tokenizer.token_bytes(token_id)
        except TokenizerError:
            return None

    def token_text(self, token_id: int) -> str:
        """The token as text, U+FFFD for bytes that are only part of a character."""
        return (self.token_bytes(token_id) or b"").decode("utf-8", "replace")


class OfText:
    """Gives out the log-probabilities of a reply with the text that they belong to.

    A token belongs to the text in which its own begins. That which ends the reply, and those of a stop string, belong
    to none; one of which a stop string took only a part stays.
    """

    def __init__(self, source: Source) -> None:
        self._eos_ids, self._decoder = source.eos_ids, source.tokenizer.decode_stream()
        self._held: list[tuple[int, TokenLogprob]] = []  # with where in the text each begins
        self._decoded = self._given = 0

    def take(self, text: str, logprobs: Iterable[TokenLogprob] | None) -> list[TokenLogprob]:
        """Those that belong to the text so far, `text` being the next piece of it, and have not been given out yet."""
        for token in logprobs or ():
            if token.token_id not in self._eos_ids:
                self._held.append((self._decoded, token))
                self._decoded += len(self._decoder.step(token.token_id))
        self._given += len(text)
        mine = [token for begin, token in self._held if begin < self._given]
        self._held = self._held[len(mine) :]
        return mine


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
    """How one route words an answer. `offset` is the number of characters sent before a piece."""

    source: Source

    def opening(self) -> list[Json]: ...
    def piece(self, text: str, logprobs: Sequence[TokenLogprob] | None, offset: int) -> Json: ...
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

    def piece(self, text: str, logprobs: Sequence[TokenLogprob] | None, offset: int) -> Json:
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

    def _logprobs(self, logprobs: Sequence[TokenLogprob] | None) -> Json | None:
        if logprobs is None:
            return None
        content = [
            self._named(t.token_id, t.logprob) | {"top_logprobs": [self._named(*top) for top in t.top]}
            for t in logprobs
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

    def piece(self, text: str, logprobs: Sequence[TokenLogprob] | None, offset: int) -> Json:
        return self._body(text, self._logprobs(logprobs, offset), None)

    def ending(self, reason: FinishReason) -> Json:
        return self._body("", None, reason)

    def usage_only(self, usage: Json) -> Json:
        return self._head.body("text_completion", [], usage=usage)

    def whole(self, result: Result) -> Json:
        body = self._body(result.text, self._logprobs(self.source.of_text(result), 0), result.finish_reason)
        return body | {"usage": usage_of(result.usage, result.timings)}

    def _body(self, text: str, logprobs: Json | None, reason: FinishReason | None) -> Json:
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._head.body("text_completion", [choice])

    def _logprobs(self, logprobs: Sequence[TokenLogprob] | None, offset: int) -> Json | None:
        if logprobs is None:
            return None
        tokens = [self.source.token_text(t.token_id) for t in logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [finite(t.logprob) for t in logprobs],
            "top_logprobs": [self._top(t) for t in logprobs] if any(t.top for t in logprobs) else None,
            "text_offset": list(accumulate(map(len, tokens), initial=offset))[:-1],
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
