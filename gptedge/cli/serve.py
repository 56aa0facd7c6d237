"""gptedge serve: an OpenAI-compatible HTTP API on this machine."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gptedge.cli.common import (
    BundleArgument,
    ContextOverflow,
    Ended,
    Json,
    NoTune,
    Profile,
    Provider,
    Threads,
    needs,
    say,
)
from gptedge.errors import EXIT_INTERRUPTED
from gptedge.serve.settings import ServerSettings, read_api_key

if TYPE_CHECKING:
    from gptedge.model import Model

_D = ServerSettings()


def command(
    bundle: BundleArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines connect.")] = _D.host,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")] = _D.port,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with the key that clients must send.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Web pages from this origin may connect; may be given several times.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Replies at once, and conversations kept in memory.")] = _D.slots,
    context_overflow: ContextOverflow = _D.context_overflow,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="A line per request on stderr.")] = False,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file that gptedge adapter made, served as the model of its name; may be given several times."
        ),
    ] = None,
    threads: Threads = None,
    profile: Profile = None,
    no_tune: NoTune = False,
    provider: Provider = None,
    as_json: Json = False,
) -> NoReturn:
    """Serve a bundle to programs that speak OpenAI's API."""
    settings = ServerSettings(
        host=host,
        port=port,
        api_key=None if api_key_file is None else read_api_key(api_key_file),
        cors_origins=tuple(cors_origin or ()),
        slots=slots,
        context_overflow=context_overflow,
        log_requests=log_requests,
        adapters=tuple(adapter or ()),
    )
    with needs("serve"):
        from gptedge.serve.server import Server, bind, url_of
    from gptedge.loading import load

    with bind(settings.host, settings.port) as sock:  # before loading: a port in use should not cost a minute
        if not settings.is_loopback and settings.api_key is None:
            say(f"warning: anyone who can reach {host} can use this server; --api-key-file asks for a key")
        with load(
            bundle, threads=threads, profile=profile, tune=not no_tune, provider=provider, long_prompts=True
        ) as model:
            url = url_of(sock)
            server = Server(model, settings, on_ready=lambda: _tell(url, model, server.model_names, as_json))
            with suppress(KeyboardInterrupt):
                server.serve_forever(sock)
    say("gptedge: stopped")
    raise Ended(EXIT_INTERRUPTED)  # nothing else ends a server


def _tell(url: str, model: Model, names: list[str], as_json: bool) -> None:
    name, *adapted = names
    say(f"gptedge: serving {' and '.join(names)} at {url}/v1 (context of {model.context_length} tokens); Ctrl+C stops")
    if as_json:
        print(
            json.dumps(
                {"url": f"{url}/v1", "model": name, "adapters": adapted, "context_length": model.context_length}
            ),
            flush=True,
        )
