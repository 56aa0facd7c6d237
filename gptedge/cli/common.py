"""What the verbs share: option types, one JSON object on stdout, and everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict

import typer

from gptedge.errors import MissingExtraError, OutputExistsError, UsageError
from gptedge.interrupts import interrupts_held
from gptedge.progress import Report
from gptedge.text import decode_utf8

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Threads = Annotated[
    int | None, typer.Option(help="Cores to compute on (default: the physical ones this process may use).")
]
Profile = Annotated[Path | None, typer.Option(help="A file that says how many threads, as bench --tune writes it.")]
NoTune = Annotated[
    bool, typer.Option("--no-tune", help="Leave out of account what bench --tune found best on this machine.")
]
Provider = Annotated[str | None, typer.Option(help="cpu or cuda (default: the best there is).")]
SourceArgument = Annotated[
    Path,
    typer.Argument(metavar="SOURCE", help="A Hugging Face folder, our own checkpoint, a .gguf, or a nanoGPT .pt."),
]
AdapterOption = Annotated[
    Path | None, typer.Option("--adapter", help="A LoRA adapter for this bundle, a file that gptedge adapter made.")
]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by export or quantize.")]


class Loading(TypedDict):
    """Settings of gptedge.load that verbs hand on."""

    threads: int | None
    profile: Path | None
    tune: bool
    provider: str | None
    adapter: Path | None


class Ended(Exception):
    """A verb has ended with this exit code, and has said all there is to say."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


# SamplingParams, as options; their defaults stand there.
MaxTokens = Annotated[int, typer.Option(help="Most tokens of a reply.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy decoding.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling.")]
MinP = Annotated[float, typer.Option(help="Least likelihood relative to the likeliest token.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages repeating.")]
PresencePenalty = Annotated[float, typer.Option(help="Subtracted from logits of tokens of the reply so far.")]
FrequencyPenalty = Annotated[float, typer.Option(help="The same, once for each time that they came.")]
ContextOverflow = Annotated[
    str, typer.Option(metavar="error|shift", help="When the context is full: fail, or leave out what is oldest.")
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]


def say(message: str) -> None:
    """A line for people, on stderr."""
    print(message, file=sys.stderr, flush=True)


def emit(value: Mapping[str, Any], *, as_json: bool, lines: Iterable[str]) -> None:
    """The result: one JSON object, or `lines` for people."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
    else:
        for line in lines:
            print(line)


def say_dropped(n_tokens: int) -> None:
    if n_tokens:
        say(f"gptedge: the context was full; the oldest {n_tokens} tokens were left out")


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" where something known is close, else the list of what is known."""
    import difflib

    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def one_of(option: str, value: str, known: Iterable[str]) -> None:
    """UsageError unless `value` is one of those known."""
    known = list(known)
    if value not in known:
        raise UsageError(f"{option} is {value!r}{nearest(value, known)}")


def text_argument(argument: str | None) -> str:
    """The text given, or standard input for - or nothing, without the line break that `echo` ends it with.

    Raises UsageError where nobody pipes to it.
    """
    if argument is not None and argument != "-":
        return argument
    if argument is None and sys.stdin.isatty():
        raise UsageError("there is no prompt; give one, or - to read it from standard input")
    text = decode_utf8(sys.stdin.buffer.read(), "standard input")
    return text[:-1].removesuffix("\r") if text.endswith("\n") else text


def check_new_file(out: Path, *, force: bool) -> None:
    """Refuse early what cannot be written, or would overwrite something."""
    from gptedge.files import check_writable

    if out.is_dir():
        raise UsageError(f"{out} is a folder, and the output is a file; choose another name for it")
    if out.exists() and not force:
        raise OutputExistsError(f"{out} exists already; choose another output or add --force")
    check_writable(out, UsageError)


def write_page(out: Path, html: str) -> None:
    """A page that is there whole or not at all."""
    from gptedge.files import new_file

    out.parent.mkdir(parents=True, exist_ok=True)
    with new_file(out) as work:
        work.write_text(html, encoding="utf-8")


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of optional packages: a missing one becomes a line that says what to install."""
    try:
        with interrupts_held():
            yield
    except ModuleNotFoundError as e:
        raise MissingExtraError(f"{e.name} is not installed, which this needs; install gptedge[{extra}]") from None


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """A bar on a terminal; elsewhere a line now and then. Both on stderr."""
    with _bar(title) if sys.stderr.isatty() else _lines(title) as report:
        yield report


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, note="")

        def report(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total or None, note=note)

        yield report


@contextmanager
def _lines(title: str, every_s: float = 5.0) -> Iterator[Report]:
    shown = time.monotonic()

    def report(done: int, total: int, note: str) -> None:
        nonlocal shown
        if time.monotonic() - shown >= every_s:
            shown = time.monotonic()
            say(f"{title}: {done}/{total or '?'} {note}".rstrip())

    yield report


def table(rows: list[list[str]]) -> list[str]:
    """Lines of a plain table; the first row is its head. The first column is aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    lines = ["  ".join(p(cell, w) for p, cell, w in zip(pad, row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]
