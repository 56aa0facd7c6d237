"""Settings of the verbs that train. The first that has one decides: the flag or the environment, then the TOML file of
--config, then the run that is resumed, then gptedge.toml's table, then its own default.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from gptedge.train.settings import LoopConfig

    Config = TypeVar("Config", bound=LoopConfig)

_FIELDS = {"context": "context_length"}  # where an option has not the name of its setting


def settings_from(
    kind: type[Config],
    context: typer.Context,
    options: Mapping[str, Any],
    *,
    file: Path | None,
    out: Path,
    resume: bool,
) -> Config:
    """Of `options`, the command's own by name, those that are not None are given. Raises UsageError."""
    from gptedge.train.output import has_run, saved_config

    def in_table(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name == "DEFAULT_MAP"

    goes_on = resume and has_run(out)
    outranked = goes_on or not in_table("config")  # beside a file that it names itself, the table's options are flags
    given: dict[str, Any] = {}
    table: dict[str, Any] = {}
    for name, value in options.items():
        if value is not None:
            (table if in_table(name) and outranked else given)[_FIELDS.get(name, name)] = value
    if goes_on:
        table = saved_config(out, kind).to_dict()
        file = None if in_table("config") else file
    if file is not None:
        return kind.from_toml(file, given, defaults=table)
    return kind.from_dict(table | given, where="the command line")


def show_settings(kind: type[LoopConfig]) -> None:
    """What --list-settings prints, and nothing after it."""
    from gptedge.train.describe import setting_rows

    for name, default, bounds, what in setting_rows(kind)[1:]:
        print(f"{name} = {default}" + (f"   ({bounds})" if bounds else "") + f"\n    {what}")
    raise typer.Exit
