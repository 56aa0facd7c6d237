"""gptedge report: one HTML page that sets bundles side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptedge.cli.common import Force, Json, Threads, check_new_file, emit, needs, progress, write_page
from gptedge.cli.evaluate import Context
from gptedge.text import counted

if TYPE_CHECKING:
    from gptedge.quantize.report import ReportData


def command(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Bundles, training runs, or folders that hold some.")
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to measure on (default: Python's language reference).")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The bundle to compare with (default: the one that is fp32, or fp16).")
    ] = None,
    context: Context = None,
    max_windows: Annotated[int, typer.Option(help="Windows of the text to measure on.")] = 8,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Set bundles side by side on one HTML page: size, quality, speed, where rounding hurts."""
    check_new_file(out, force=force)
    with needs("quantize"):
        from gptedge.quantize.report import collect
    from gptedge.evaluate.sample import SAMPLE_NAME, sample_text
    from gptedge.text import read_text

    with progress("report") as report:
        data = collect(
            folders,
            text=sample_text() if text is None else read_text(text),
            text_name=SAMPLE_NAME if text is None else text.name,
            reference=reference,
            context=context,
            max_windows=max_windows,
            threads=threads,
            report=report,
        )
    from gptedge import __version__
    from gptedge.quantize.report_page import page

    write_page(out, page(data, version=__version__))
    emit({"page": str(out), **data.as_json()}, as_json=as_json, lines=[f"{out}: {_what(data)}"])


def _what(data: ReportData) -> str:
    parts = [f"{counted(len(data.bundles), 'bundle')} on {data.tokens:,} positions"] if data.bundles else []
    return ", ".join([*parts, *([counted(len(data.runs), "training run")] if data.runs else [])])
