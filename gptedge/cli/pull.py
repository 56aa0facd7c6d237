"""gptedge pull: fetch a model, whole and checked."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gptedge.cli.common import Json, emit, progress


def command(
    name: Annotated[
        str, typer.Argument(metavar="NAME|hf:OWNER/REPO", help="A name of the catalogue, or a repository.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to put it in (default: the user's folder of models).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is already there.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch a model: a name of the catalogue (smollm2-135m-instruct), or hf:OWNER/REPO."""
    from gptedge.pull import pull

    with progress("pull") as report:
        result = pull(name, out, force=force, progress=lambda file, done, total: report(done, total or 0, file))
    value = {**asdict(result), "path": str(result.path)}
    found = "already there" if result.cached else f"fetched in {result.seconds:.0f} s"
    lines = [f"{result.path} ({result.bytes / 1e6:.1f} MB, {found})"]
    emit(value, as_json=as_json, lines=[*lines, f"next: gptedge export {shlex.quote(str(result.path))} OUT"])
