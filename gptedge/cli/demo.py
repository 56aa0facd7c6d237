"""gptedge demo: the whole line on real input, from nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from gptedge.cli.common import Json, emit, needs, progress, say, table
from gptedge.progress import Report


def command(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    train_seconds: Annotated[float | None, typer.Option(help="Time to train for (default 120).")] = None,
    as_json: Json = False,
) -> None:
    """Train, export, quantize and chat, in one go."""
    with needs("all"):
        # Asked for now, rather than after two minutes of training.
        import gptedge.export.exporter
        import gptedge.train.trainer  # noqa: F401  (only asked for)
        from gptedge import demo
    result = demo.run(out, _Terminal(), train_seconds=train_seconds or demo.TRAIN_SECONDS)
    head = ["bundle", "MB", "perplexity", "KL", "tokens/s"]
    rows = [
        [
            r.bundle,
            f"{r.size_mb:.1f}",
            f"{r.ppl_increase:+.2%}" if r.kl else "reference",
            f"{r.kl:.4f}",
            f"{r.decode_tokens_per_s:.0f}",
        ]
        for r in result.rows
    ]
    emit(result.as_json(), as_json=as_json, lines=["", *table([head, *rows]), "", f"Chat next: {result.chat_command}"])


class _Terminal:
    """A demo.Screen on stderr, which leaves stdout to the result."""

    def title(self, text: str) -> None:
        say(f"\n== {text}")

    def line(self, text: str) -> None:
        say(text)

    def piece(self, text: str) -> None:
        import sys

        print(text, end="", file=sys.stderr, flush=True)

    def progress(self, title: str) -> AbstractContextManager[Report]:
        return progress(title)

    def training(self) -> AbstractContextManager[Callable[[Any], None]]:
        from gptedge.cli.training_view import training_view

        return training_view("train")
