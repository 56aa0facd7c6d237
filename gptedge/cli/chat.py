"""gptedge chat: talk with a model, in a Textual app or line by line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptedge.cli.common import (
    AdapterOption,
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
)
from gptedge.config import SamplingParams
from gptedge.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from gptedge.model import Model
    from gptedge.tui.plain import Repl
    from gptedge.tui.store import SavedChat

_D = SamplingParams()


def command(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="[BUNDLE]", help="A folder made by export or quantize."),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Line by line, without an app; so it is in a pipe, or 2> a file.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last conversation.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = _D.max_tokens,
    temperature: Temperature = _D.temperature,
    top_k: TopK = _D.top_k,
    top_p: TopP = _D.top_p,
    min_p: MinP = _D.min_p,
    repetition_penalty: RepetitionPenalty = _D.repetition_penalty,
    presence_penalty: PresencePenalty = _D.presence_penalty,
    frequency_penalty: FrequencyPenalty = _D.frequency_penalty,
    seed: Seed = _D.seed,
    context_overflow: ContextOverflow = _D.context_overflow,
    adapter: AdapterOption = None,
    threads: Threads = None,
    profile: Profile = None,
    no_tune: NoTune = False,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Chat with a model."""
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
        context_overflow=context_overflow,
    )
    loading = Loading(threads=threads, profile=profile, tune=not no_tune, provider=provider, adapter=adapter)
    saved = _saved() if resume else None
    folder = _bundle(bundle, saved)
    if saved and system is not None:
        others = [m for m in saved.messages if m["role"] != "system"]
        saved.messages[:] = [{"role": "system", "content": system}, *others]
    on_terminal = all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))  # Textual draws on stderr
    if plain or as_json or not on_terminal:
        _plain(folder, saved, system, params, loading, as_json)
    else:
        _app(folder, saved, system, params, loading)


def _saved() -> SavedChat:
    from gptedge.tui.store import chats_folder, latest

    return latest(chats_folder())


def _bundle(given: Path | None, saved: SavedChat | None) -> Path:
    if given is not None:
        return given
    if saved is not None and saved.bundle:
        return Path(saved.bundle)
    raise UsageError(
        "there is no bundle to chat with; give its folder, or set GPTEDGE_CHAT_BUNDLE; "
        "gptedge demo makes one, and so do gptedge pull and gptedge export"
    )


def _app(
    bundle: Path,
    saved: SavedChat | None,
    system: str | None,
    params: SamplingParams,
    loading: Loading,
) -> None:
    from gptedge.tui.colours import BackgroundQuery

    with BackgroundQuery() as query:  # the terminal answers while Textual is imported, which takes 0.2 s
        try:
            from gptedge.tui.app import run
        except ModuleNotFoundError as e:
            if (e.name or "").partition(".")[0] != "textual":
                raise
            raise MissingExtraError("the chat app needs Textual; install gptedge[tui], or use --plain") from None
        answer = query.answer()
    run(bundle, system=system, params=params, loading=loading, saved=saved, answer=answer)


def _plain(
    bundle: Path,
    saved: SavedChat | None,
    system: str | None,
    params: SamplingParams,
    loading: Loading,
    as_json: bool,
) -> None:
    from gptedge.loading import load
    from gptedge.tui.plain import Repl
    from gptedge.tui.store import ChatFile, chats_folder

    with load(bundle, **loading, long_prompts=saved is not None) as model:
        chat = model.chat(system=system, params=params)
        file = None
        if saved:
            chat.load_dict({"messages": saved.messages})
            file = ChatFile(saved.path, bundle, saved.messages)
        elif sys.stdin.isatty():  # a person's conversation is kept, a pipe's is not
            file = ChatFile.new(chats_folder(), bundle)
        repl = Repl(model, chat, file, silent=as_json)
        repl.run()
        if as_json:
            _print_json(bundle, model, repl)


def _print_json(bundle: Path, model: Model, repl: Repl) -> None:
    import json

    replies = [
        {"finish_reason": r.finish_reason, "usage": vars(r.usage), "timings": vars(r.timings)} for r in repl.results
    ]
    value = {"bundle": str(bundle), "recipe": model.bundle.recipe, **repl.chat.to_dict(), "replies": replies}
    print(json.dumps(value, ensure_ascii=False))
