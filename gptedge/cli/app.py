"""The command `gptedge`: its verbs, and what becomes of errors. Where settings come from is in `settings`."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer

from gptedge.cli.common import Ended
from gptedge.cli.settings import (
    Tables,
    check_environment,
    complaint,
    is_on,
    name_variables,
    parameters_in,
    read_tables,
    wants_json,
)
from gptedge.errors import EXIT_INTERRUPTED, GateFailed, GptEdgeError, UsageError
from gptedge.interrupts import KILLS

# Each is a file in this folder with a function `command`; in the order of the help page.
VERBS = (
    "train", "finetune", "pull", "export", "adapter", "quantize", "eval", "bench", "report", "explain",
    "generate", "chat", "serve", "inspect", "verify", "doctor", "demo",
)  # fmt: skip
# What typer's parser raises. Some versions of typer bring their own copy of click, so it is found through typer.
_CommandLineError: Any = typer.BadParameter.__mro__[2]
_CONTEXT = {"help_option_names": ["-h", "--help"]}


def build() -> Any:
    """The whole command, verbs included."""
    app = typer.Typer(
        help="Train, export, quantize and chat with small GPTs, through ONNX Runtime and without Rust.",
        add_completion=False,
        rich_markup_mode=None,  # plain help pages: rich would cost every start 60 ms
        pretty_exceptions_enable=False,
        context_settings=_CONTEXT,
    )
    app.callback()(_root)
    for verb in VERBS:
        module = import_module(f"gptedge.cli.{_FILES.get(verb, verb)}")
        app.command(verb, context_settings=_CONTEXT)(module.command)
    command: Any = typer.main.get_command(app)
    name_variables(command.commands)
    return command


_FILES = {"eval": "evaluate"}  # where the verb's name would shadow something


# No variables set these: GPTEDGE_VERSION would let a gate pass unrun.
_Debug = Annotated[
    bool, typer.Option("--debug", help="Show a traceback when something fails; so does GPTEDGE_DEBUG=1.")
]
_Version = Annotated[bool, typer.Option("--version", help="Print the version.")]


def _root(debug: _Debug = False, version: _Version = False) -> None:
    if version:
        from gptedge import __version__

        print(f"gptedge {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or is_on(os.environ.get("GPTEDGE_DEBUG", ""))
    arguments = [a for a in arguments if a != "--debug"]
    verb = next((a for a in arguments if a in VERBS), None)
    as_json = "--json" in arguments or wants_json(verb, {})  # also where the file cannot be read
    if not arguments or arguments == ["--version"]:
        arguments = [*arguments, "doctor"] if arguments else ["--help"]
    for number in KILLS:
        _end_like_an_interrupt(number)
    _write_utf8()
    try:
        tables = read_tables(VERBS)
        as_json = "--json" in arguments or wants_json(verb, tables)
        result = _invoke(arguments, verb, tables)
        if sys.stdout:  # there is none where it was closed
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (Ended, typer.Exit) as e:
        return e.exit_code
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED, as_json)
    except BrokenPipeError as e:
        if not _reader_has_gone():
            return _fail(_plain(e), 1, as_json)
        _let_go_of_unread()
        return 0
    except _CommandLineError as e:
        if _is_follower():
            return UsageError.exit_code
        return _fail(complaint(e), UsageError.exit_code, as_json)
    except GptEdgeError as e:
        if debug:
            traceback.print_exc()
        if e.is_reported or (isinstance(e, UsageError) and _is_follower()):
            with suppress(KeyboardInterrupt):
                time.sleep(1)  # torchrun ends all once one has ended, and the one that says it is to come first
            return e.exit_code
        _let_go_of_unread()
        # A gate is judged after the result, which is the one object, has been printed.
        return _fail(str(e), e.exit_code, as_json and not isinstance(e, GateFailed))
    except Exception as e:  # the last line of defence: nobody is shown a traceback without asking
        if debug:
            traceback.print_exc()
        return _fail(_plain(e), 1, as_json)


def _let_go_of_unread() -> None:
    """Where a reader has gone: what stdout still holds would fail as the interpreter ends, which has its own code."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_follower() -> bool:
    """Whether this is one of torchrun's processes that does not lead: the one that does refuses the same command."""
    return os.environ.get("RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" in os.environ


def _write_utf8() -> None:
    """Let stdout take any text, whatever the locale."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(encoding="utf-8")


def _invoke(arguments: list[str], verb: str | None, tables: Tables) -> Any:
    """What the verb returns. Not through typer's own main, which would end the process where a reader has gone."""
    app = build()
    check_environment(app.commands, verb)
    with app.make_context("gptedge", arguments, default_map=parameters_in(tables, app.commands)) as context:
        return app.invoke(context)


def _reader_has_gone() -> bool:
    """Whether nobody reads our output any more, as with `| head`; another pipe that breaks is a failure."""
    if not hasattr(select, "poll"):  # Windows
        return True
    outputs = select.poll()
    for output in (1, 2):
        outputs.register(output, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in outputs.poll(0))


def _fail(message: str, code: int, as_json: bool) -> int:
    """One line on stderr; with --json also the one object on stdout."""
    message = " ".join(message.split())
    print(f"gptedge: {message}", file=sys.stderr)
    if as_json:
        with suppress(OSError):  # stdout may be what failed
            print(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False), flush=True)
    return code


def _plain(e: Exception) -> str:
    """A line for what nobody foresaw, or for the operating system's refusals."""
    if isinstance(e, OSError):
        from gptedge.files import FULL

        if e.errno in FULL and e.filename:
            return f"{e.filename} cannot be written: {e.strerror}; make room and run again"
        where = f"{e.filename}: " if e.filename else ""
        return f"{where}{e.strerror or e}"
    if isinstance(e, MemoryError):
        return "out of memory; use a smaller model, a shorter context or fewer threads"
    return f"{type(e).__name__}: {e} (run again with --debug for the traceback)"


def _end_like_an_interrupt(number: int) -> None:
    """Let a polite kill unwind as Ctrl+C does, so that half-written output is removed."""

    def interrupt(*_: object) -> NoReturn:
        if number != signal.SIGTERM:  # a terminal that closes says so twice, and once is enough to unwind
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    if signal.getsignal(number) == signal.SIG_IGN:  # by nohup, which is to outlive its terminal
        return
    with suppress(ValueError):  # not the main thread: an embedding program keeps its own handlers
        signal.signal(number, interrupt)
