"""gptedge explain: what a model made of a text, token by token, and where its heads looked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptedge.cli.common import Force, Json, Threads, check_new_file, emit, needs, text_argument, write_page
from gptedge.errors import UsageError
from gptedge.text import counted

if TYPE_CHECKING:
    from gptedge.evaluate.explain import Explanation


def command(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT|BUNDLE", help="A model, before or after export.")],
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="What to look at; - reads stdin, without its last line break.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write a page with every map instead.")] = None,
    layer: Annotated[int | None, typer.Option(help="Show the attention of this layer's heads, counted from 0.")] = None,
    head: Annotated[int | None, typer.Option(help="Of that layer, show this head's attention in numbers.")] = None,
    top: Annotated[int, typer.Option(help="Likeliest tokens to show at each place.")] = 5,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the text to show; longer texts are cut.")] = 128,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show how likely each token of a text was, what else could have come, and where the heads looked."""
    if head is not None and layer is None:
        raise UsageError("--head needs --layer, which says of which layer")
    if html is not None:
        check_new_file(html, force=force)
    with needs("export,train"):
        from gptedge.evaluate.explain import explain

        found = explain(source, text_argument(text), max_tokens=max_tokens, top=top, threads=threads)
    _check_map(found, layer, head)
    if html is not None:
        from gptedge.evaluate.explain_page import page

        write_page(html, page(found))
    if as_json:
        emit({**found.as_json(layer, head), "page": html and str(html)}, as_json=True, lines=())
    elif html is not None:
        print(f"{html}: {counted(len(found.tokens), 'token')}, {_maps(found)}")
    else:
        from rich.console import Console

        from gptedge.evaluate.explain_terminal import print_explanation

        print_explanation(Console(highlight=False), found, layer=layer, head=head)


def _check_map(found: Explanation, layer: int | None, head: int | None) -> None:
    """The layer and the head exist. Raises UsageError."""
    if layer is None:
        return
    if found.attention is None:
        raise UsageError(f"--layer is {layer}, and there are no maps: {found.attention_note}")
    for name, value, count in zip(("layer", "head"), (layer, head), found.attention.shape, strict=False):
        if value is not None and not 0 <= value < count:
            raise UsageError(f"--{name} is {value}; the model's {name}s are 0 to {count - 1}")


def _maps(found: Explanation) -> str:
    if found.attention is None:
        return str(found.attention_note)
    layers, heads = found.attention.shape[:2]
    return f"maps of {counted(layers, 'layer')} with {counted(heads, 'head')} each"
