"""An explanation as one HTML page that needs nothing else. Its numbers are there without the script, which only lets a
head and a token be chosen; each head's map is a small picture, and the script reads the weights out of it.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from gptedge.evaluate.explain import Explanation, Floats, Guess, Token, gaze
from gptedge.evaluate.explain_terminal import chance, quoted
from gptedge.page import html_page, section
from gptedge.text import counted

_FULL = 12.0  # bits from which the colour does not grow
_STRONGEST = 70  # percent of the colour, at which letters stay readable


def page(e: Explanation) -> str:
    """The whole page."""
    from gptedge import __version__

    parts = [section("text", "How surprising each token was", _chips(e))]
    parts.append(section("tokens", "What else could have come", _table(e.tokens) + _next(e.next)))
    if e.attention is not None:
        parts.append(section("attention", "Where the heads looked", _attention(e.tokens, e.attention)))
    here = Path(__file__)
    return html_page(
        title=Path(e.source).name or e.source,
        eyebrow="gptedge explain",
        lede=_lede(e),
        body="\n".join(parts),
        footer=_footer(e, __version__),
        style=here.with_name("explain.css"),
        script=here.with_name("explain.js"),
    )


def _lede(e: Explanation) -> str:
    sentences = [f"{escape(e.kind)}, {counted(len(e.tokens), 'token')}."]
    scored = [t for t in e.tokens if t.surprise_bits is not None]
    if scored:
        most = max(scored, key=lambda t: t.surprise_bits or 0.0)
        sentences.append(
            f"<strong>{e.bits_per_token:.2f} bits</strong> a token, a perplexity of {e.perplexity:,.1f}. "
            f"The greatest surprise was <code>{escape(quoted(most.text))}</code>: {most.surprise_bits:.1f} bits, "
            f"a chance of {escape(chance(most.probability or 0.0))}."
        )
    if note := e.left_out():
        sentences.append(f"{escape(note[0].upper() + note[1:])}.")
    if e.attention_note:
        sentences.append(f"{escape(e.attention_note[0].upper() + e.attention_note[1:])}.")
    return f'<p class="lede">{" ".join(sentences)}</p>\n'


def _footer(e: Explanation, version: str) -> str:
    notes = (
        "Surprise is −log2 of the chance that the model gave the token that came; expected is the entropy of its "
        "prediction, the surprise it should have met on average. ␣ is a space, ↵ a line's end; ⟨E6 BC⟩ are bytes that "
        "are no whole character.",
        "An attention map's rows are the tokens that look, its columns those they look at; a row's weights sum to one. "
        "Pictures show square roots of weights, so that small ones are seen.",
    )
    shown = notes if e.attention is not None else notes[:1]
    return f"<p>{' '.join(shown)}</p><p>Made by gptedge {escape(version)}.</p>"


# ---- tokens --------------------------------------------------------------------------------------------------------


def _strength(bits: float | None) -> int:
    """Percent of the strongest colour."""
    return round(_STRONGEST * min(1.0, (bits or 0.0) / _FULL))


def _chips(e: Explanation) -> str:
    chips = "".join(_chip(t) for t in e.tokens)
    legend = (
        f'<p class="legend"><span>0 bits</span><i></i><span>{_FULL:g} bits and more</span>'
        "<span>The number under a token is its surprise.</span></p>"
    )
    return f'<div class="card words"><p class="chips">{chips}</p>{legend}</div>\n'


def _chip(t: Token) -> str:
    known = t.probability is not None
    title = f"token {t.place}: chance {chance(t.probability or 0.0)}, rank {t.rank:,}" if known else f"token {t.place}"
    number = f"{t.surprise_bits:.1f}" if known else "–"
    chip = (
        f'<a class="token" href="#t{t.place}" style="--v:{_strength(t.surprise_bits)}%" title="{escape(title)}">'
        f"{escape(quoted(t.text))}<small>{number}</small></a>"
    )
    return f'{chip}<i class="break"></i>' if "↵" in t.text else chip


_HEADS = ("token", "chance", "surprise", "expected", "rank", "likeliest at this place")


def _table(tokens: Sequence[Token]) -> str:
    head = "".join(f'<th scope="col">{h}</th>' for h in _HEADS)
    rows = "\n".join(map(_row, tokens))
    return (
        '<div class="card scroll" role="region" tabindex="0" aria-labelledby="tokens"><table class="tokens">\n'
        f'<thead><tr><th scope="col">#</th>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>\n'
    )


def _row(t: Token) -> str:
    name = f"<code>{escape(quoted(t.text))}</code><small>{t.id}</small>"
    head = f'<tr id="t{t.place}"><td>{t.place}</td><th scope="row">{name}</th>'
    if t.probability is None:
        return f'{head}<td>–</td><td>–</td><td>–</td><td>–</td><td class="others">nothing stands before it</td></tr>'
    return (
        f'{head}<td>{escape(chance(t.probability))}<i class="bar" style="--w:{100 * t.probability:.1f}%"></i></td>'
        f'<td style="--v:{_strength(t.surprise_bits)}%"><b>{t.surprise_bits:.2f}</b></td><td>{t.entropy_bits:.2f}</td>'
        f'<td>{t.rank:,}</td><td class="others">{_guesses(t.alternatives, t.id)}</td></tr>'
    )


def _guesses(guesses: Sequence[Guess], came: int | None = None) -> str:
    return "".join(
        f"<span{' class=came' if g.id == came else ''}><code>{escape(quoted(g.text))}</code> "
        f"{escape(chance(g.probability))}</span>"
        for g in guesses
    )


def _next(guesses: Sequence[Guess]) -> str:
    return f'<p class="others next"><strong>Next could come</strong> {_guesses(guesses)}</p>\n'


# ---- attention -----------------------------------------------------------------------------------------------------


def _attention(tokens: Sequence[Token], attention: Floats) -> str:
    layers, heads = attention.shape[:2]
    notes = gaze(attention)
    head = "".join(f'<th scope="col">{h}</th>' for h in range(heads))
    rows = "\n".join(
        f'<tr><th scope="row">{i}</th>{"".join(_map(i, h, attention[i, h], notes[i][h]) for h in range(heads))}</tr>'
        for i in range(layers)
    )
    words = "".join(
        f'<button type="button" class="token">{escape(quoted(t.text))}<small></small></button>' for t in tokens
    )
    return (
        "<p>Choose a head in the grid, and a token: the numbers are the percent of its attention that each earlier "
        "token gets.</p>\n"
        '<div class="viewer" hidden>\n<figure><figcaption id="which"></figcaption><img id="large" alt=""></figure>\n'
        f'<div class="card words"><p class="chips" id="looks">{words}</p><p id="said" role="status"></p></div></div>\n'
        '<div class="card scroll" role="region" tabindex="0" aria-label="A map for each layer and head">'
        f'<table class="maps"><thead><tr><th scope="col">layer \\ head</th>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _map(i: int, h: int, weights: Floats, note: dict[str, float]) -> str:
    said = (
        f"layer {i}, head {h}: {note['itself']:.0%} on the token itself, {note['previous']:.0%} on the one before, "
        f"{note['first']:.0%} on the first; {note['distance']:.1f} tokens away on average"
    )
    return (
        f'<td><button type="button" data-layer="{i}" data-head="{h}" title="{said}">'
        f'<img src="{_picture(weights)}" alt="{said}"></button></td>'
    )


def _picture(weights: Floats) -> str:
    """A PNG of [T, T] weights as a data address: grey 255 - 255 sqrt(w), clear where nothing can be seen."""
    n = len(weights)
    grey = 255 - np.rint(255 * np.sqrt(np.clip(weights, 0, 1)))
    seen = np.tri(n, dtype=bool)
    pixels = np.stack([np.where(seen, grey, 0), np.where(seen, 255, 0)], -1).astype(np.uint8)  # [T, T, 2]
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def png(pixels: np.ndarray) -> bytes:
    """Grey and alpha, uint8 [H, W, 2], as the PNG specification has it: colour type 4, no filters."""
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + 2 * width), np.uint8)  # each begins with its filter, none
    lines[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 4, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 6)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts
