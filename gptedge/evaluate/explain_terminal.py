"""An explanation drawn in a terminal with rich. Colour repeats what a number, or a shade of ░▒▓, says beside it.

Colours go from dark to bright without turning back, and every cell names its ink too, so they read alike on dark and
light terminals and to colour-blind eyes. Where there is no colour, maps are drawn in shades.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from gptedge.evaluate.explain import Explanation, Floats, Guess, Token, gaze
from gptedge.text import counted

_BITS = (1.0, 3.0, 6.0, 9.0, 12.0)
"""Surprise from which a token is marked more strongly; below the first it is not."""
_RAMP = ((24, 17, 56), (84, 24, 107), (149, 44, 110), (212, 72, 81), (248, 137, 58), (251, 214, 98))
"""Dark to bright, luminance rising steadily (after matplotlib's inferno)."""
_SHADES = " ·░▒▓█"
_SIDE = 16  # pixels of a small map
_LABEL = 12
_LEAST = 0.005  # weights below it are half a percent and less


def print_explanation(console: Console, e: Explanation, *, layer: int | None, head: int | None) -> None:
    """Everything for people, on one console."""
    for part in _parts(console, e, layer, head):
        console.print(part)


def _parts(console: Console, e: Explanation, layer: int | None, head: int | None) -> Iterator[RenderableType]:
    yield Text(_headline(e), style="bold")
    yield Padding(_running(e.tokens), (1, 0))
    yield _legend()
    yield Padding(_table(e.tokens, console.width), (1, 0))
    yield _next(e.next)
    if note := e.left_out():
        yield Text(note, style="dim")
    yield Text()
    if e.attention is None:
        yield Text(e.attention_note or "", style="dim")
    elif layer is None:
        means = e.attention.mean(1)  # [L, T, T]
        yield Text("attention, the mean of each layer's heads", style="bold")
        yield _how_to_read("--layer N shows a layer's heads, --head N one of them in numbers")
        yield _gallery(console, means, [f"layer {i}" for i in range(len(means))])
    elif head is None:
        notes = gaze(e.attention[layer : layer + 1])[0]
        yield Text(f"attention of layer {layer}, head by head", style="bold")
        yield _how_to_read(f"--layer {layer} --head N shows one in numbers; prev, first: weight on these tokens")
        captions = [f"head {h}\nprev {n['previous']:.0%} first {n['first']:.0%}" for h, n in enumerate(notes)]
        yield _gallery(console, e.attention[layer], captions)
    else:
        yield Text(f"attention of layer {layer}, head {head}, percent", style="bold")
        yield _how_to_read("weights under half a percent are ·")
        yield _numbers(console, e.tokens, e.attention[layer, head])


def _headline(e: Explanation) -> str:
    known = [f"{e.bits_per_token:.2f} bits a token", f"perplexity {e.perplexity:,.1f}"] if e.perplexity else []
    return " · ".join([e.source, e.kind, counted(len(e.tokens), "token"), *known])


def _how_to_read(hint: str) -> Text:
    return Text(f"down: the token that looks; across: what it looks at. {hint}", style="dim")


# ---- the text ------------------------------------------------------------------------------------------------------


def _level(bits: float | None) -> int:
    return sum((bits or 0.0) >= bound for bound in _BITS)


def _marked(level: int) -> Style:
    """Paper and ink of a level of surprise; level 0 is the terminal's own."""
    return Style() if level == 0 else _cell(level / len(_BITS))


def _running(tokens: Sequence[Token]) -> Text:
    text = Text()
    for token in tokens:
        text.append(token.text, _marked(_level(token.surprise_bits)))
        if "↵" in token.text:
            text.append("\n")
    return text


def _legend() -> Text:
    text = Text("surprise, bits: ", style="dim")
    for level, bound in enumerate((0.0, *_BITS)):
        text.append(f" {bound:g}+ " if level else f" under {_BITS[0]:g} ", _marked(level))
    return text


def _table(tokens: Sequence[Token], width: int) -> Table:
    """A row for each token; the alternatives that a narrow terminal has no room for are left out."""
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim", padding=(0, 1))
    table.add_column("#", justify="right", style="dim")
    table.add_column("token", max_width=24, overflow="ellipsis", no_wrap=True)
    table.add_column("chance", justify="right")
    wide = width >= 90
    if wide:
        table.add_column("", no_wrap=True)
    table.add_column("bits", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("likeliest", no_wrap=True, overflow="ellipsis", ratio=1)
    unknown = ("–", *([""] if wide else []), "–", "–", "nothing before it")
    for t in tokens:
        if t.probability is None:
            cells = [Text(x, style="dim") for x in unknown]
        else:
            bar = [_bar(t.probability)] if wide else []
            surprise = Text(f" {t.surprise_bits:.1f} ", _marked(_level(t.surprise_bits)))
            cells = [Text(chance(t.probability)), *bar, surprise, Text(f"{t.rank:,}"), _guesses(t.alternatives, t.id)]
        table.add_row(str(t.place), Text(quoted(t.text)), *cells)
    return table


def _bar(p: float, width: int = 10) -> Text:
    eighths = round(8 * width * p)
    full, rest = divmod(eighths, 8)
    text = "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")
    return Text(text.ljust(width), style="cyan")


def _guesses(guesses: Sequence[Guess], came: int | None = None) -> Text:
    """The one that came is bold."""
    text = Text()
    for g in guesses:
        text.append(quoted(g.text), "bold" if g.id == came else "")
        text.append(f" {chance(g.probability)}   ", "dim")
    return text


def _next(guesses: Sequence[Guess]) -> Text:
    return Text().append("next: ", "bold").append_text(_guesses(guesses))


def quoted(text: str) -> str:
    """Spaces at the ends become ␣, that they be seen."""
    inner = text.strip(" ")
    if not inner:
        return "␣" * len(text)
    start = len(text) - len(text.lstrip(" "))
    return "␣" * start + inner + "␣" * (len(text) - start - len(inner))


def chance(p: float) -> str:
    """Percent with two digits that mean something."""
    return f"{p:.0%}" if p >= 0.0995 else f"{p:.1%}" if p >= 0.0095 else f"{p:.2%}" if p >= 0.0001 else "<0.01%"


# ---- maps ----------------------------------------------------------------------------------------------------------


def _gallery(console: Console, maps: Floats, captions: Sequence[str]) -> Table:
    """Small maps side by side, as many as the terminal is wide."""
    small = [_small(m) for m in maps]
    has_colour = console.color_system is not None and not console.no_color
    drawn = [(_halves if has_colour else _shaded)(m) for m in small]
    width = len(small[0]) * (1 if has_colour else 2)
    width = max(width, *(len(line) for c in captions for line in c.split("\n")))
    across = max(1, (console.width + 2) // (width + 2))
    grid = Table.grid(padding=(0, 2))
    for start in range(0, len(drawn), across):
        row = zip(captions[start : start + across], drawn[start : start + across], strict=True)
        grid.add_row(*(Group(Text(caption, style="dim"), picture, Text()) for caption, picture in row))
    return grid


def _small(weights: Floats) -> Floats:
    """At most _SIDE pixels a side, each the largest weight in it; NaN where nothing can be seen. [P, P]"""
    n = len(weights)
    if n <= _SIDE:
        return np.where(np.tri(n, dtype=bool), weights, np.nan)
    edges = np.linspace(0, n, _SIDE + 1).astype(int)
    pooled = np.maximum.reduceat(np.maximum.reduceat(weights, edges[:-1], 0), edges[:-1], 1)
    return np.where(np.tri(_SIDE, dtype=bool), pooled, np.nan)


def _halves(pixels: Floats) -> Text:
    """Two pixels to a character cell, one above the other."""
    text = Text()
    for y in range(0, len(pixels), 2):
        below = pixels[y + 1] if y + 1 < len(pixels) else np.full(len(pixels), np.nan)
        for top, bottom in zip(pixels[y], below, strict=True):
            text.append(*_two(float(top), float(bottom)))
        text.append("\n" if y + 2 < len(pixels) else "")
    return text


def _two(top: float, bottom: float) -> tuple[str, Style]:
    if np.isnan(top) and np.isnan(bottom):
        return " ", Style()
    if np.isnan(top):
        return "▄", Style(color=_colour(_brightness(bottom)))
    behind = None if np.isnan(bottom) else _colour(_brightness(bottom))
    return "▀", Style(color=_colour(_brightness(top)), bgcolor=behind)


def _shaded(pixels: Floats) -> Text:
    def shade(v: float) -> str:
        return " " if np.isnan(v) else _SHADES[1 + round(_brightness(v) * (len(_SHADES) - 2))]

    return Text("\n".join("".join(2 * shade(float(v)) for v in row) for row in pixels))


def _brightness(weight: float) -> float:
    """Small weights show too: the eye sees roots better than shares."""
    return float(np.sqrt(min(1.0, max(0.0, weight))))


def _colour(share: float) -> str:
    """Of the ramp, as #rrggbb."""
    at = min(1.0, max(0.0, share)) * (len(_RAMP) - 1)
    i = min(int(at), len(_RAMP) - 2)
    mixed = (a + (b - a) * (at - i) for a, b in zip(_RAMP[i], _RAMP[i + 1], strict=True))
    return "#" + "".join(f"{round(v):02x}" for v in mixed)


def _cell(share: float) -> Style:
    return Style(color="#ffffff" if share < 0.65 else "#000000", bgcolor=_colour(share))


def _numbers(console: Console, tokens: Sequence[Token], weights: Floats) -> Table:
    """The whole map where it fits, else the four tokens that each token looks at most."""
    fits = _LABEL + 4 + 3 * len(tokens) <= console.width
    return _grid(tokens, weights) if fits else _most(tokens, weights)


def _grid(tokens: Sequence[Token], weights: Floats) -> Table:
    table = Table.grid(padding=0)
    table.add_column(width=_LABEL, no_wrap=True, overflow="ellipsis")
    table.add_column(width=4)
    table.add_row("", "", *(Text(f"{t.place % 100:>3}", style="dim") for t in tokens))
    for t, row in zip(tokens, weights, strict=True):
        seen = [_percent(float(w)) for w in row[: t.place + 1]]
        table.add_row(Text(quoted(t.text)), Text(f"{t.place % 100:>3} ", style="dim"), *seen)
    return table


def _percent(weight: float) -> Text:
    shown = f"{100 * weight:3.0f}" if weight >= _LEAST else "  ·"
    return Text(shown, _cell(_brightness(weight)))


def _most(tokens: Sequence[Token], weights: Floats) -> Table:
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim", padding=(0, 1))
    table.add_column("#", justify="right", style="dim")
    table.add_column("token", max_width=24, no_wrap=True, overflow="ellipsis")
    table.add_column("looks at", no_wrap=True, overflow="ellipsis", ratio=1)
    for t, row in zip(tokens, weights, strict=True):
        text = Text()
        most = np.argsort(-row[: t.place + 1], kind="stable")[:4].tolist()
        for i in [i for i in most if row[i] >= _LEAST]:
            text.append(_percent(float(row[i])).plain, _cell(_brightness(float(row[i]))))
            text.append(f" {quoted(tokens[i].text)}")
            text.append(f" {i}   ", "dim")
        table.add_row(str(t.place), Text(quoted(t.text)), text)
    return table
