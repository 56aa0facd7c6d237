"""A loaded bundle that generates text: what `gptedge.load` gives. The API that programs embed; it never needs torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import index
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, overload

from gptedge.bundle import Bundle
from gptedge.chat_prompt import ChatPrompt
from gptedge.chat_template import ChatTemplate, load_chat_template
from gptedge.config import SamplingParams
from gptedge.conversation import Chat
from gptedge.errors import ContextOverflowError, UsageError
from gptedge.loading import likely_long, load
from gptedge.runtime.adapter import Adapter
from gptedge.runtime.batch import BATCH_SIZE, generate_batch
from gptedge.runtime.context import PlainText, Shortener, Window
from gptedge.runtime.generate import Chunks, Result, Stream, chunks, constraint_of
from gptedge.runtime.prefixes import Prefixes
from gptedge.runtime.sampling import check_bias
from gptedge.runtime.session import Session
from gptedge.text import checked_text
from gptedge.tokenizer import Tokenizer


class Model:
    """A loaded bundle, shared by any number of generations and chats, from any threads. Close it, or use `with`."""

    def __init__(
        self, bundle: Bundle, session: Session, tokenizer: Tokenizer, *, threads_from: str = "default"
    ) -> None:
        self.bundle = bundle
        self.threads_from = threads_from
        """Who chose the number of threads: see tuning.Choice."""
        self.session = session
        self.tokenizer = tokenizer
        self.prefixes = Prefixes()
        """What chats began with, to be shared by those that begin alike."""
        self._adapter: Adapter | None = None

    @property
    def adapter(self) -> Adapter | None:
        """What `load_adapter` gave, or None: used by generations that begin from now on, and by chats' next replies."""
        return self._adapter

    @adapter.setter
    def adapter(self, adapter: Adapter | None) -> None:
        if not isinstance(adapter, Adapter | None):
            raise UsageError(f"adapter is {repr(adapter)[:60]}; give what load_adapter returned, or None")
        self._adapter = adapter

    def load_adapter(self, path: str | Path) -> Adapter:
        """A LoRA adapter (.onnx_adapter, made by gptedge adapter) for this bundle; assign it to `adapter` to use it.

        Several may be loaded, and swapped while others generate. Raises UsageError when the bundle takes none,
        BundleError when the file is broken or was made for another model.
        """
        return self.session.load_adapter(Path(path))

    @overload
    def generate(self, prompt: str, params: SamplingParams | None = None, **changes: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], params: SamplingParams | None = None, **changes: Any) -> list[str]: ...
    def generate(self, prompt: str | Sequence[str], params: SamplingParams | None = None, **changes: Any) -> Any:
        """The text that follows `prompt`; of a list, those that follow each, generated together, about twice as fast.

        Settings are those of SamplingParams, whole or by name; `batch_size` is how many texts run at once. Kernels give
        other last bits for several texts than for one, so that a text may differ from the one that comes alone.
        """
        if isinstance(prompt, str):
            return self.run(prompt, params, **changes).text
        return [result.text for result in self.run(prompt, params, **changes)]

    @overload
    def run(self, prompt: str, params: SamplingParams | None = None, **changes: Any) -> Result: ...
    @overload
    def run(self, prompt: Sequence[str], params: SamplingParams | None = None, **changes: Any) -> list[Result]: ...
    def run(
        self,
        prompt: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        **changes: Any,
    ) -> Any:
        """Like `generate`, with token ids, finish reason, usage and timings."""
        if isinstance(prompt, str):
            _check_batch_size(batch_size)
            with self.stream(prompt, params, **changes) as stream:
                for _ in stream:
                    pass
            return stream.result
        return self.run_list(prompt, params, Event(), batch_size=batch_size, **changes)

    def run_list(
        self,
        prompt: Sequence[str],
        params: SamplingParams | None,
        cancelled: Event,
        *,
        batch_size: int = BATCH_SIZE,
        **changes: Any,
    ) -> list[Result]:
        """`run` of a list, which ends with what has come so far once `cancelled` is set, by any thread."""
        _check_batch_size(batch_size)
        if not isinstance(prompt, Iterable) or isinstance(prompt, bytes):
            raise UsageError(f"the prompt is {repr(prompt)[:60]}; it must be text (str), or a list of texts")
        settings = sampling_params(params, changes)
        windows = [self._window_of(p, i, settings) for i, p in enumerate(prompt, 1)]
        return generate_batch(self.session, self.tokenizer, windows, settings, batch_size, self.adapter, cancelled)

    def _window_of(self, prompt: str, number: int, settings: SamplingParams) -> Window:
        """`window` of a prompt of a list, the `number`-th."""
        try:
            return self.window(self._encode(prompt), settings)
        except ContextOverflowError as e:
            raise ContextOverflowError(f"prompt {number} of the list: {e}") from None

    def stream(self, prompt: str, params: SamplingParams | None = None, **changes: Any) -> Stream:
        """The text that follows `prompt`, chunk by chunk. Raises ContextOverflowError when the prompt does not fit."""
        return self.stream_ids(self._encode(prompt), params, **changes)

    def _encode(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(checked_text(prompt, "the prompt"), add_special_tokens=True)

    def stream_ids(self, prompt: Sequence[int], params: SamplingParams | None = None, **changes: Any) -> Stream:
        """Like `stream`, of token ids."""
        settings = sampling_params(params, changes)
        window, adapter = self.window(prompt, settings), self.adapter

        def make(cancelled: Event) -> Chunks:
            return chunks(self.session, self.tokenizer, self.session.new_cache(adapter), window, settings, cancelled)

        return Stream(make, on_end=lambda _: None, prompt_tokens=len(window.ids))

    def chat(
        self,
        *,
        system: str | None = None,
        cache: str | Path | None = None,
        params: SamplingParams | None = None,
        **changes: Any,
    ) -> Chat:
        """A new conversation, with its own history and KV cache. `system` is the system message, if any.

        `cache` is a file of `Chat.save_cache` to go on from, system message included.
        """
        if cache is not None and system is not None:
            raise UsageError("system and cache cannot both be given; a saved chat has its own system message")
        chat = Chat(self, system=system, params=sampling_params(params, changes))
        if cache is not None:
            chat.load_cache(cache)
        return chat

    @cached_property
    def chat_template(self) -> ChatTemplate:
        return load_chat_template(self.bundle.path)

    @cached_property
    def chat_prompt(self) -> ChatPrompt:
        """Turns messages into the token ids of a prompt."""
        return ChatPrompt(self.chat_template, self.tokenizer)

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its reply together."""
        return self.session.context_length

    def window(self, ids: Sequence[int], params: SamplingParams, shortener: Shortener | None = None) -> Window:
        """A prompt that can be run: `ids`, or the beginning-of-text token where they are none.

        With context_overflow "shift", `shortener` says what goes where it does not fit; without one, the oldest tokens
        do. Raises ContextOverflowError when no room is left for a token of the reply, UsageError where ids, or those of
        logit_bias, are not the vocabulary's, or where no reply can follow the schema.
        """
        check_bias(params, self.session.vocab_size)
        constraint_of(params, self.tokenizer, self.bundle.eos_ids)
        try:
            ids = [index(i) for i in ids]
        except TypeError:
            raise UsageError("the prompt is not a list of token ids, which are whole numbers") from None
        if not ids:
            if self.tokenizer.bos_id is None:
                raise UsageError("the prompt is empty, and this model has no beginning-of-text token to start from")
            ids = [self.tokenizer.bos_id]
        bad = next((i for i in ids if not 0 <= i < self.session.vocab_size), None)
        if bad is not None:
            raise UsageError(f"token id {bad} is outside the vocabulary of {self.session.vocab_size}")
        shortener = shortener or PlainText(ids, keep=int(ids[0] == self.tokenizer.bos_id))
        shifts = params.context_overflow == "shift"
        window = Window(ids, self.context_length, shortener if shifts else None)
        if window.room < 1:
            can_shift = not shifts and Window(ids, self.context_length, shortener).room > 0
            or_shift = ", or let the oldest go with context_overflow shift" if can_shift else ""
            raise ContextOverflowError(
                f"the prompt has {len(ids)} tokens and the model's context holds {self.context_length}, "
                "the reply included; shorten the prompt",
                or_shift,
            )
        return window

    def checked_prompt(self, ids: Sequence[int]) -> list[int]:
        """`window` of a prompt that must fit as it is."""
        return self.window(ids, SamplingParams()).ids

    def close(self) -> None:
        """Give the memory back. Streams under way end with BundleError."""
        self.session.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_batch_size(value: int) -> None:
    if type(value) is not int or value < 1:
        raise UsageError(f"batch_size is {value!r}; it must be a whole number, at least 1")


def sampling_params(params: SamplingParams | None, changes: dict[str, Any]) -> SamplingParams:
    """`params`, or the defaults, with some fields changed. Raises UsageError for a name that is not a field."""
    if params is not None and not isinstance(params, SamplingParams):
        raise UsageError(f"params is {repr(params)[:60]}; it must be SamplingParams, or give settings by name")
    known = {f.name for f in dataclasses.fields(SamplingParams)}
    if unknown := sorted(set(changes) - known):
        raise UsageError(f"{unknown[0]!r} is not a sampling parameter; known are {', '.join(sorted(known))}")
    return dataclasses.replace(params or SamplingParams(), **changes)


def generate(bundle: Model | str | Path, prompt: str, **changes: Any) -> str:
    """`Model.generate` of a model, or of a bundle that is loaded for this one call."""
    if isinstance(bundle, Model):
        return bundle.generate(prompt, **changes)
    with load(bundle, long_prompts=likely_long(prompt)) as model:
        return model.generate(prompt, **changes)


def stream(bundle: Model | str | Path, prompt: str, **changes: Any) -> Stream:
    """`Model.stream` of a model, or of a bundle, which is then loaded for this one call."""
    return _loaded(bundle, long_prompts=likely_long(prompt)).stream(prompt, **changes)


def chat(bundle: Model | str | Path, *, system: str | None = None, **changes: Any) -> Chat:
    """`Model.chat` of a model, or of a bundle, which is then loaded for this one chat."""
    return _loaded(bundle).chat(system=system, **changes)


def _loaded(bundle: Model | str | Path, **settings: Any) -> Model:
    return bundle if isinstance(bundle, Model) else load(bundle, **settings)
