"""gptedge generate: text after a prompt, from an argument or a pipe."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptedge.cli.common import (
    AdapterOption,
    BundleArgument,
    ContextOverflow,
    FrequencyPenalty,
    Json,
    Loading,
    MaxTokens,
    MinP,
    NoTune,
    PresencePenalty,
    Profile,
    Provider,
    RepetitionPenalty,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    say_dropped,
    text_argument,
)
from gptedge.config import SamplingParams
from gptedge.errors import UsageError
from gptedge.text import for_output, read_text

if TYPE_CHECKING:
    from gptedge.runtime.generate import Stream

_D = SamplingParams()


def command(
    bundle: BundleArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; - or nothing reads it from standard input, without its last line break."),
    ] = None,
    max_tokens: MaxTokens = _D.max_tokens,
    temperature: Temperature = _D.temperature,
    top_k: TopK = _D.top_k,
    top_p: TopP = _D.top_p,
    min_p: MinP = _D.min_p,
    repetition_penalty: RepetitionPenalty = _D.repetition_penalty,
    presence_penalty: PresencePenalty = _D.presence_penalty,
    frequency_penalty: FrequencyPenalty = _D.frequency_penalty,
    seed: Seed = _D.seed,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    schema: Annotated[
        Path | None, typer.Option(help="A JSON Schema: the reply is a JSON text of a value that it allows.")
    ] = None,
    adapter: AdapterOption = None,
    context_overflow: ContextOverflow = _D.context_overflow,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: use the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    no_speculate: Annotated[
        bool, typer.Option("--no-speculate", help="Check no guessed tokens: the same reply, slower where it repeats.")
    ] = False,
    threads: Threads = None,
    profile: Profile = None,
    no_tune: NoTune = False,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Generate text."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        schema=None if schema is None else read_schema(schema),
        context_overflow=context_overflow,
    )
    if system is not None and not chat:
        raise UsageError("--system needs --chat: without a chat template there is no place for a system message")
    text = text_argument(prompt)
    from gptedge.loading import likely_long, load

    start = time.perf_counter()
    loading = Loading(threads=threads, profile=profile, tune=not no_tune, provider=provider, adapter=adapter)
    long = likely_long(text) and adapter is None
    with load(bundle, **loading, speculate=not no_speculate, long_prompts=long) as model:
        load_ms = round((time.perf_counter() - start) * 1000, 2)
        stream = model.chat(system=system).stream(text, **vars(params)) if chat else model.stream(text, params)
        _print_json(stream, load_ms, model.session.provider) if as_json else _print_text(stream)
        say_dropped(stream.result.usage.dropped_tokens)


def read_schema(path: Path) -> Any:
    """A JSON Schema; what it says is checked once the model is there. Raises UsageError for a file that is no JSON."""
    import json

    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise UsageError(f"the schema {path} is not JSON: {e}") from None


def _print_text(stream: Stream) -> None:
    shown = False
    try:
        with stream:
            for chunk in stream:
                print(for_output(chunk.text, sys.stdout), end="", flush=True)
                shown = shown or bool(chunk.text)
    except BaseException:
        if shown:
            print(flush=True)  # what is said of the error on stderr begins a line
        raise
    print()


def _print_json(stream: Stream, load_ms: float, provider: str) -> None:
    import json

    with stream:
        for _ in stream:
            pass
    r = stream.result
    value: dict[str, Any] = {
        "text": r.text,
        "token_ids": list(r.token_ids),
        "finish_reason": r.finish_reason,
        "usage": vars(r.usage),
        "timings": {"load_ms": load_ms, **vars(r.timings)},
        "provider": provider,
    }
    print(json.dumps(value, ensure_ascii=False))
