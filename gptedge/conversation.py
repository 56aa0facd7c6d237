"""A conversation with a model: its messages, and the KV cache that makes the next turn cheap."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptedge.config import SamplingParams
from gptedge.errors import DataError, UsageError
from gptedge.runtime.generate import Chunk, Result, Stream, chunks
from gptedge.runtime.kv_file import load_cache, save_cache
from gptedge.turns import Turns

if TYPE_CHECKING:
    from gptedge.model import Model

_BUSY = "this chat is already answering; cancel that reply, or use another chat"
ROLES = ("system", "user", "assistant")


class Chat:
    """One conversation. `messages` is its history; the KV cache follows it, and only what changed is run again.

    One reply at a time: asking while another is under way raises UsageError. A reply that is cancelled, or that fails,
    stays in the history as far as it came; where nothing came, the history is as it was before the question.
    """

    def __init__(self, model: Model, *, system: str | None, params: SamplingParams) -> None:
        self._model = model
        self._cache = model.session.new_cache()
        self._busy = threading.Lock()
        self._spoken: tuple[str, list[int]] = ("", [])
        self.dropped_messages = 0
        """Oldest messages, the system message aside, that the model no longer sees: they did not fit its context."""
        self.params = params
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def send(self, text: str, **changes: Any) -> Result:
        """Ask, and wait for the whole reply. `changes` are sampling parameters for this reply."""
        with self.stream(text, **changes) as stream:
            for _ in stream:
                pass
        return stream.result

    def stream(self, text: str, **changes: Any) -> Stream:
        """Ask, and get the reply chunk by chunk."""
        return self._reply([*self.messages, {"role": "user", "content": text}], changes)

    def regenerate(self, **changes: Any) -> Stream:
        """Answer the last question anew; the reply there was is dropped."""
        messages = list(self.messages)
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] != "user":
            raise UsageError("there is no question to answer again")
        return self._reply(messages, changes)

    def edit(self, index: int, text: str) -> None:
        """Replace the text of message `index` (negative counts from the end) and drop what came after it."""
        if not -len(self.messages) <= index < len(self.messages):
            raise UsageError(f"there is no message {index}; the conversation has {len(self.messages)}")
        index %= len(self.messages)
        self.dropped_messages = 0
        self.messages[index] = {**self.messages[index], "content": text}
        del self.messages[index + 1 :]

    def fork(self) -> Chat:
        """An independent copy from here on, KV cache included."""
        self._check_idle()
        with self._busy:
            twin = Chat(self._model, system=None, params=self.params)
            twin.messages, twin._cache, twin._spoken = deepcopy(self.messages), self._cache.copy(), self._spoken
            twin.dropped_messages = self.dropped_messages
            return twin

    def clear(self) -> None:
        """Start over, keeping the system message."""
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        self.dropped_messages = 0

    def to_dict(self) -> dict[str, Any]:
        """The conversation as JSON-ready data."""
        return {"messages": deepcopy(self.messages)}

    def load_dict(self, data: Mapping[str, Any]) -> None:
        """Take over a conversation that `to_dict` gave. Raises DataError when it is not one."""
        self.messages = checked_messages(data.get("messages"))
        self.dropped_messages = 0

    def save_cache(self, path: str | Path) -> None:
        """Write the conversation and its KV cache to one file, for `load_cache` of this bundle. Nothing is rounded.

        It takes `KVCache.bytes_per_token` for each token held, and replaces the file there was only once it is whole.
        """
        self._check_idle()
        with self._busy:
            state = {**self.to_dict(), "dropped_messages": self.dropped_messages, "spoken": list(self._spoken)}
            save_cache(Path(path), self._model.session, self._cache, state)

    def load_cache(self, path: str | Path) -> None:
        """Go on with the conversation that `save_cache` wrote, in the place of this one, without running it again.

        Raises DataError when the file is not whole, or was saved with another bundle.
        """
        self._check_idle()
        with self._busy:
            cache, state = load_cache(Path(path), self._model.session, self._model.adapter)
            messages, spoken = checked_messages(state.get("messages")), _checked_spoken(state.get("spoken"))
            self.messages, self._cache, self._spoken = messages, cache, spoken
            self.dropped_messages = state.get("dropped_messages", 0)  # Turns takes no other number than one that fits

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are kept."""
        return len(self._cache)

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the prompt for a reply to `messages`."""
        return self._encode(self._model.chat_prompt.render(messages))

    def _encode(self, text: str) -> list[int]:
        """Text that goes on from the last prompt and reply keeps their very tokens, which are in the cache.

        Encoded anew, a reply can come out as other tokens than those the model chose.
        """
        prompt, (spoken, ids) = self._model.chat_prompt, self._spoken
        if spoken and text.startswith(spoken):
            return [*ids, *prompt.encode(text[len(spoken) :], continued=True)]
        return prompt.encode(text)

    def _reply(self, messages: list[dict[str, str]], changes: dict[str, Any]) -> Stream:
        from gptedge.model import sampling_params

        model, settings = self._model, sampling_params(self.params, changes)
        dropped = self.dropped_messages if settings.context_overflow == "shift" else 0
        turns = Turns(messages, dropped, model.chat_prompt.render, self._encode)
        window = model.window(turns.ids, settings, turns)
        self._check_idle()
        adapter = model.adapter

        def make(cancelled: threading.Event) -> Iterator[Chunk]:
            self._take()  # only now: a stream that is never read must not block the chat
            self._cache.use(adapter)
            return chunks(model.session, model.tokenizer, self._cache, window, settings, cancelled)

        def end(result: Result | None) -> None:
            if result is not None and result.token_ids:
                self.messages = [*messages, {"role": "assistant", "content": result.text}]
                self.dropped_messages = turns.dropped
                reply = model.tokenizer.decode(result.token_ids, skip_special_tokens=False)
                self._spoken = (turns.text + reply, [*turns.ids, *result.token_ids])
            self._busy.release()

        return Stream(make, end)

    def _check_idle(self) -> None:
        if self._busy.locked():
            raise UsageError(_BUSY)

    def _take(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise UsageError(_BUSY)


def _checked_spoken(value: Any) -> tuple[str, list[int]]:
    match value:
        case [str(text), [*ids]] if all(type(i) is int for i in ids):
            return text, ids
    raise DataError("what was last said must be a text and its token ids")


def checked_messages(value: Any) -> list[dict[str, str]]:
    """Messages as [{"role", "content"}]. Raises DataError naming the first that is something else."""
    if not isinstance(value, list):
        raise DataError("messages must be a list of {role, content}")
    for i, m in enumerate(value):
        if not isinstance(m, Mapping) or m.get("role") not in ROLES or not isinstance(m.get("content"), str):
            raise DataError(f"message {i} must have a role of {', '.join(ROLES)} and content that is text")
    return [{"role": m["role"], "content": m["content"]} for m in value]
