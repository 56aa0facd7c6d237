"""A conversation with a model: its messages, and the KV cache that makes the next turn cheap."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptedge.config import SamplingParams
from gptedge.errors import DataError, UsageError
from gptedge.runtime.generate import Chunks, Result, Stream, chunks
from gptedge.runtime.kv_file import load_cache, save_cache
from gptedge.runtime.prefixes import common_prefix
from gptedge.text import check_scalars, checked_text
from gptedge.tokenizer import Tokenizer
from gptedge.turns import Messages, Turns

if TYPE_CHECKING:
    from gptedge.model import Model

_BUSY = "this chat is already answering; cancel that reply, or use another chat"
_GONE_ON = "this chat has gone on since this reply was asked for; ask again"
_FIRST_QUESTION = ["system", "user"]
"""Roles of the messages when a chat with a system message is asked first."""
_QUESTIONS = ("a", "7")
"""Two that have no first token in common."""
ROLES = ("system", "user", "assistant")


class Chat:
    """One conversation. `messages` is its history; the KV cache follows it, and only what changed is run again.

    One reply at a time: asking, or changing the history, while one is under way raises UsageError, and so does reading
    a stream that was asked for before the history changed. A reply that is cancelled, or that fails, stays in the
    history as far as it came; where nothing came, the history is as it was before the question.
    """

    def __init__(self, model: Model, *, system: str | None, params: SamplingParams) -> None:
        self._model = model
        self._cache = model.session.new_cache()
        self._busy = threading.Lock()
        self._spoken: tuple[str, list[int]] = ("", [])
        self.dropped_messages = 0
        """Oldest messages, the system message aside, that the model no longer sees: they did not fit its context."""
        self.params = params
        self.messages: Messages = []
        if system is not None:
            self.messages.append({"role": "system", "content": checked_text(system, "system")})

    def send(self, text: str, **changes: Any) -> Result:
        """Ask, and wait for the whole reply. `changes` are sampling parameters for this reply."""
        with self.stream(text, **changes) as stream:
            for _ in stream:
                pass
        return stream.result

    def stream(self, text: str, **changes: Any) -> Stream:
        """Ask, and get the reply chunk by chunk."""
        before = list(self.messages)
        return self._reply(before, [*before, {"role": "user", "content": checked_text(text, "the message")}], changes)

    def regenerate(self, **changes: Any) -> Stream:
        """Answer the last question anew; the reply there was is dropped."""
        before = list(self.messages)
        messages = before[:-1] if before and before[-1]["role"] == "assistant" else before
        if not messages or messages[-1]["role"] != "user":
            raise UsageError("there is no question to answer again")
        return self._reply(before, messages, changes)

    def edit(self, index: int, text: str) -> None:
        """Replace the text of message `index` (negative counts from the end) and drop what came after it."""
        with self._idle():
            if not isinstance(index, int) or not -len(self.messages) <= index < len(self.messages):
                raise UsageError(f"there is no message {index!r}; the conversation has {len(self.messages)}")
            checked_text(text, "the message")
            index %= len(self.messages)
            self.dropped_messages = 0
            self.messages = [*self.messages[:index], {**self.messages[index], "content": text}]

    def fork(self) -> Chat:
        """An independent copy from here on, KV cache included."""
        with self._idle():
            twin = Chat(self._model, system=None, params=self.params)
            twin.messages, twin._cache, twin._spoken = deepcopy(self.messages), self._cache.copy(), self._spoken
            twin.dropped_messages = self.dropped_messages
            return twin

    def clear(self) -> None:
        """Start over, keeping the system message."""
        with self._idle():
            self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
            self.dropped_messages = 0

    def to_dict(self) -> dict[str, Any]:
        """The conversation as JSON-ready data."""
        return {"messages": deepcopy(self.messages)}

    def load_dict(self, data: Mapping[str, Any]) -> None:
        """Take over a conversation that `to_dict` gave. Raises DataError when it is not one."""
        with self._idle():
            self.messages = checked_messages(data.get("messages") if isinstance(data, Mapping) else None)
            self.dropped_messages = 0

    def save_cache(self, path: str | Path) -> None:
        """Write the conversation and its KV cache to one file, for `load_cache` of this bundle. Nothing is rounded.

        It takes `KVCache.bytes_per_token` for each token held, and replaces the file there was only once it is whole.
        """
        with self._idle():
            state = {**self.to_dict(), "dropped_messages": self.dropped_messages, "spoken": list(self._spoken)}
            save_cache(Path(path), self._model.session, self._cache, state)

    def load_cache(self, path: str | Path) -> None:
        """Go on with the conversation that `save_cache` wrote, in the place of this one, without running it again.

        Raises DataError when the file is not whole, or was saved with another bundle.
        """
        with self._idle():
            cache, state = load_cache(Path(path), self._model.session, self._model.adapter)
            messages, spoken = checked_messages(state.get("messages")), _checked_spoken(state.get("spoken"))
            self.messages, self._cache, self._spoken = messages, cache, spoken
            self.dropped_messages = state.get("dropped_messages", 0)  # Turns takes no other number than one that fits

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are kept."""
        return len(self._cache)

    def _encode(self, text: str) -> list[int]:
        """Text that goes on from the last prompt and reply keeps their very tokens, which are in the cache.

        Encoded anew, a reply can come out as other tokens than those the model chose.
        """
        prompt, (spoken, ids) = self._model.chat_prompt, self._spoken
        kept, length = len(ids), len(spoken)
        if not text.startswith(spoken):  # a question is changed, or answered anew
            kept, length = _kept_tokens(self._model.tokenizer, ids, text)
        rest = prompt.encode(text[length:], continued=kept > 0)
        return [*ids[:kept], *rest]

    def _length_of_system(self, message: Mapping[str, str]) -> int:
        """Tokens of a prompt that are the system message's, whatever is asked after it."""
        render, encode = self._model.chat_prompt.render, self._model.chat_prompt.encode
        prompts = [encode(render([dict(message), {"role": "user", "content": text}])) for text in _QUESTIONS]
        return common_prefix(*prompts)

    def _reply(self, before: Messages, messages: Messages, changes: dict[str, Any]) -> Stream:
        """A reply to `messages`, as long as the history is what it was `before`."""
        from gptedge.model import sampling_params

        model, settings = self._model, sampling_params(self.params, changes)
        dropped = self.dropped_messages if settings.context_overflow == "shift" else 0
        turns = Turns(messages, dropped, model.chat_prompt.render, self._encode)
        window = model.window(turns.ids, settings, turns)
        if self._busy.locked():
            raise UsageError(_BUSY)
        adapter = model.adapter

        def make(cancelled: threading.Event) -> Chunks:
            self._take(before)  # only now: a stream that is never read must not block the chat
            try:
                self._cache.use(adapter)
                if not len(self._cache):
                    self._cache = model.prefixes.copy_for(window.ids, adapter) or self._cache
            except BaseException:  # no memory for it
                self._busy.release()
                raise
            return chunks(model.session, model.tokenizer, self._cache, window, settings, cancelled)

        def end(result: Result | None) -> None:
            try:
                if result is not None and result.token_ids:
                    keep(result)
            finally:
                self._busy.release()

        def keep(result: Result) -> None:
            self.messages = [*messages, {"role": "assistant", "content": result.text}]
            self.dropped_messages = turns.dropped
            reply = model.tokenizer.decode(result.token_ids, skip_special_tokens=False)
            self._spoken = (turns.text + reply, [*turns.ids, *result.token_ids])
            if not result.timings.cached_tokens and [m["role"] for m in messages] == _FIRST_QUESTION:
                model.prefixes.keep(self._cache, self._length_of_system(messages[0]))

        return Stream(make, end, prompt_tokens=len(window.ids))

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Within, no reply is under way."""
        self._take()
        try:
            yield
        finally:
            self._busy.release()

    def _take(self, before: Messages | None = None) -> None:
        if not self._busy.acquire(blocking=False):
            raise UsageError(_BUSY)
        if before is not None and self.messages != before:
            self._busy.release()
            raise UsageError(_GONE_ON)


def _kept_tokens(tokenizer: Tokenizer, ids: list[int], text: str) -> tuple[int, int]:
    """How many of `ids` begin `text`, and how much of it they are, up to a special token: behind one, text is encoded
    as if nothing came before it."""
    stream, kept, length, at = tokenizer.decode_stream(skip_special_tokens=False), 0, 0, 0
    for i, token in enumerate(ids, 1):
        piece = stream.step(token)
        if not text.startswith(piece, at):
            break
        at += len(piece)
        if token in tokenizer.special_ids:
            kept, length = i, at
    return kept, length


def _checked_spoken(value: Any) -> tuple[str, list[int]]:
    match value:
        case [str(text), [*ids]] if all(type(i) is int for i in ids):
            return text, ids
    raise DataError("what was last said must be a text and its token ids")


def checked_messages(value: Any) -> list[dict[str, str]]:
    """Messages as [{"role", "content"}]. Raises DataError naming the first that is something else."""
    if not isinstance(value, list):
        raise DataError("a conversation must have messages, a list of {role, content}, as to_dict gives it")
    for i, m in enumerate(value):
        if not isinstance(m, Mapping) or m.get("role") not in ROLES or not isinstance(m.get("content"), str):
            raise DataError(f"message {i} must have a role of {', '.join(ROLES)} and content that is text")
        try:
            check_scalars(m["content"])
        except DataError as e:
            raise DataError(f"message {i}: {e}") from None
    return [{"role": m["role"], "content": m["content"]} for m in value]
