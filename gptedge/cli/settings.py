"""Where a verb's settings come from when no flag gives them: GPTEDGE_<VERB>_<OPTION> in the environment, else a TOML
file with a table for each verb ($GPTEDGE_CONFIG, else ./gptedge.toml, else ~/.config/gptedge/config.toml).

Both may set whatever the verb takes on the command line, arguments included. In the file, what may be given several
times is a list, or one value; a variable is always one value, whatever spaces and colons it holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptedge.cli.common import nearest
from gptedge.errors import UsageError

# Verbs by name, and what the parser raises: typer does not export the types.
Commands = Mapping[str, Any]
ParserError = Any
Tables = Mapping[str, Mapping[str, Any]]


def name_variables(commands: Commands) -> None:
    """Give every option and argument of the verbs the variable that may set it."""
    for verb, command in commands.items():
        for parameter in command.params:
            parameter.envvar = [_variable(verb, _plain(name)) for name in parameter.opts]
            parameter.type.envvar_list_splitter = "\0"  # which no variable holds, so that none is taken apart


def _variable(verb: str, name: str) -> str:
    return f"GPTEDGE_{verb}_{name}".upper()


def _plain(name: str) -> str:
    """--max-tokens as max_tokens."""
    return name.lstrip("-").replace("-", "_")


def check_environment(commands: Commands, verb: str | None) -> None:
    """A variable that means no option of the verb is a slip that would leave a gate or a bound unset."""
    if verb is None:
        return
    known = [variable for parameter in commands[verb].params for variable in parameter.envvar]
    for variable in os.environ:
        if variable.startswith(_variable(verb, "")) and variable not in known:
            raise UsageError(f"{variable} is no setting of {verb}{nearest(variable, known)}")


def config_path() -> Path | None:
    """The TOML file there is. Raises UsageError where one was asked for that is not there."""
    if asked := os.environ.get("GPTEDGE_CONFIG"):
        if not Path(asked).is_file():
            raise UsageError(f"GPTEDGE_CONFIG is {asked}, which is no file; correct its path, or unset the variable")
        return Path(asked)
    usual = (Path("gptedge.toml"), Path.home() / ".config" / "gptedge" / "config.toml")
    return next((path for path in usual if path.is_file()), None)


def read_tables(verbs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The options of each verb that the TOML file sets, as they stand there."""
    path = config_path()
    if path is None:
        return {}
    import tomllib

    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not a TOML file: {e}") from None
    for verb, options in tables.items():
        if verb not in verbs or not isinstance(options, dict):
            raise UsageError(f"{path}: there is no verb {verb!r}{nearest(verb, verbs)}")
    return tables


def wants_json(verb: str | None, tables: Tables) -> bool:
    """Whether the environment or `tables` ask for --json."""
    if verb is None:
        return False
    return is_on(os.environ.get(_variable(verb, "json")) or tables.get(verb, {}).get("json", ""))


def is_on(value: object) -> bool:
    """Whether a switch is turned on by what a variable or the file has for it."""
    return str(value).strip().lower() not in ("", "0", "false", "f", "no", "n", "off")


def parameters_in(tables: Tables, commands: Commands) -> dict[str, dict[str, Any]]:
    """What `tables` set, checked, by the names of the commands' parameters."""
    path = config_path()
    return {verb: _named(options, commands[verb].params, f"{path}: [{verb}]") for verb, options in tables.items()}


def _named(options: Mapping[str, Any], parameters: Iterable[Any], where: str) -> dict[str, Any]:
    """--max-tokens is max-tokens, or max_tokens."""
    known = {_plain(flag): p for p in parameters for flag in p.opts}
    named = {}
    for name, value in options.items():
        parameter = known.get(_plain(name))
        if parameter is None:
            raise UsageError(f"{where} has no option {name!r}{nearest(name, known)}")
        named[parameter.name] = _as_typed(value, f"{where} {name}", several=_takes_several(parameter))
    return named


def _takes_several(parameter: Any) -> bool:
    return parameter.nargs == -1 or getattr(parameter, "multiple", False)


def _as_typed(value: Any, where: str, *, several: bool) -> str | list[str]:
    """As on the command line, so that 2.7 tokens are refused as they are there, and not made 2."""
    values = value if several and isinstance(value, list) else [value]
    if any(isinstance(v, list | dict) for v in values):
        what = "text, a number, or a list of them" if several else "text, a number, true or false"
        raise UsageError(f"{where} is {repr(value)[:60]}; it must be {what}")
    return [str(v) for v in values] if several else str(value)


def complaint(error: ParserError) -> str:
    """What the parser says in one line; where a variable or the file gave the value, it is called by its name there."""
    parameter, context = getattr(error, "param", None), getattr(error, "ctx", None)
    if parameter is not None and context is not None:
        parameter.show_envvar = False  # else its variable would be named beside every flag
        source = context.get_parameter_source(parameter.name)
        if source is not None and source.name == "ENVIRONMENT":
            error.param_hint = next(name for name in parameter.envvar if name in os.environ)
        elif source is not None and source.name == "DEFAULT_MAP":
            error.param_hint = f"{parameter.opts[0].lstrip('-')} in [{context.info_name}] of {config_path()}"
    message: str = error.format_message()
    return message
