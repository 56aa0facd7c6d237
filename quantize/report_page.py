"""A report as one HTML page: no script, no network, nothing beside it. Numbers are those of `report`, rounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from gptedge.page import html_page, section
from gptedge.quantize.report import BundleReport, Difference, Guess, Piece, ReportData
from gptedge.quantize.report_charts import Point, curve, scatter
from gptedge.quantize.report_runs import MEASURES, RunReport
from gptedge.quantize.report_weights import WeightError

_COLOURS = 6  # classes s0 to s5 in the style sheet
_SHADES = (0.25, 0.75, 2.0, 4.0)  # nats from which a token of an excerpt is marked more strongly


def page(data: ReportData, *, version: str) -> str:
    """The whole page."""
    return html_page(
        title=_title(data),
        eyebrow="gptedge report",
        lede=_lede(data),
        body="\n".join(_sections(data)),
        footer=_footer(data, version),
        style=Path(__file__).with_name("report.css"),
    )


def _sections(data: ReportData) -> Iterator[str]:
    if data.bundles:
        yield section("figures", "Size, quality, speed", _table(data.bundles) + _plot(data))
    measured = [b for b in data.bundles if not b.is_reference]
    if measured:
        yield section("weights", "Where rounding hurts: the error of each weight", "".join(map(_heat_map, measured)))
        yield section("tokens", "Where the models part", _differences(data, measured))
    if data.runs:
        yield section("training", "Training", "".join(map(_run, data.runs)))


def _title(data: ReportData) -> str:
    if not data.bundles:
        return ", ".join(run.name for run in data.runs)
    rest = [b.name for b in data.bundles if not b.is_reference]
    if not rest:
        return data.bundles[0].name
    return f"{rest[0] if len(rest) == 1 else f'{len(rest)} bundles'} against {data.reference}"


def _lede(data: ReportData) -> str:
    """What a reader in a hurry takes away: the smallest and the nearest."""
    measured = [b for b in data.bundles if b.kl_divergence and b.top1_agreement is not None]
    if not measured:
        return ""
    smallest, nearest = min(measured, key=lambda b: b.size_mb), min(measured, key=_kl)
    whole = data.bundles[0].size_mb
    sentences = [
        f"{_strong(smallest.name)} is {whole / smallest.size_mb:.1f}× smaller than {escape(str(data.reference))}, "
        f"at {_change(smallest.ppl_increase)} perplexity."
    ]
    if nearest is not smallest:
        sentences.append(
            f"{_strong(nearest.name)} stays nearest: it is {whole / nearest.size_mb:.1f}× smaller and agrees on the "
            f"likeliest token {nearest.top1_agreement:.1%} of the time."
        )
    return f'<p class="lede">{" ".join(sentences)}</p>\n'


def _strong(name: str) -> str:
    return f"<strong>{escape(name)}</strong>"


def _kl(bundle: BundleReport) -> float:
    return bundle.kl_divergence["mean"] if bundle.kl_divergence else 0.0


def _change(share: float) -> str:
    return f"{share:+.2%}" if abs(share) < 0.1 else f"{share:+.1%}"


# ---- figures -------------------------------------------------------------------------------------------------------

_HEADS = ("bundle", "recipe", "size, MB", "perplexity", "change", "mean KL", "p99 KL", "same top-1", "tokens/s")


def _table(bundles: Sequence[BundleReport]) -> str:
    most = {
        "size": max(b.size_mb for b in bundles),
        "kl": max(map(_kl, bundles)),
        "speed": max(b.decode_tokens_per_s for b in bundles),
    }
    head = "".join(f'<th role="columnheader" scope="col">{h}</th>' for h in _HEADS)
    rows = "\n".join(_row(b, i, most) for i, b in enumerate(bundles))
    return (
        '<table role="table" class="figures">\n<thead role="rowgroup">'
        f'<tr role="row">{head}</tr></thead>\n<tbody role="rowgroup">\n{rows}\n</tbody></table>\n'
    )


def _row(b: BundleReport, i: int, most: dict[str, float]) -> str:
    interval = b.ppl_increase_interval
    spread = f"<small>{_change(interval[0])} to {_change(interval[1])}</small>" if interval else ""
    kl = b.kl_divergence
    cells = [
        escape(b.recipe),
        _bar(f"{b.size_mb:.1f}", b.size_mb, most["size"]),
        f"{b.perplexity:.3f}",
        "reference" if b.is_reference else _change(b.ppl_increase) + spread,
        _bar(f"{kl['mean']:.3g}", kl["mean"], most["kl"]) if kl else "–",
        f"{kl['p99']:.3g}" if kl else "–",
        f"{b.top1_agreement:.1%}" if b.top1_agreement is not None else "–",
        _bar(f"{b.decode_tokens_per_s:.1f}", b.decode_tokens_per_s, most["speed"]),
    ]
    name = f'<th role="rowheader" scope="row"><i class="dot {_colour(i)}"></i>{escape(b.name)}</th>'
    filled = "".join(
        f'<td role="cell" data-label="{label}"><span>{cell}</span></td>'
        for label, cell in zip(_HEADS[1:], cells, strict=True)
    )
    return f'<tr role="row">{name}{filled}</tr>'


def _bar(text: str, value: float, most: float) -> str:
    width = 100 * value / most if most else 0
    return f'{text}<i class="bar" style="--w:{width:.1f}%"></i>'


def _colour(i: int) -> str:
    return f"s{i % _COLOURS}"


def _plot(data: ReportData) -> str:
    if len(data.bundles) < 2:
        return ""
    points = [
        Point(
            b.name,
            f"{b.size_mb:.1f} MB · KL {_kl(b):.3g} · {b.decode_tokens_per_s:.0f} tokens/s",
            b.size_mb,
            _kl(b) or None,
            b.decode_tokens_per_s,
            _colour(i),
        )
        for i, b in enumerate(data.bundles)
    ]
    drawn = scatter(
        points,
        title="Size against divergence against speed",
        description="; ".join(f"{p.name}: {p.note}" for p in points),
        x_label="size, MB →",
        y_label="mean KL divergence from the reference, nats (logarithmic; lower is nearer)",
    )
    return (
        f"<figure>{drawn}<figcaption>Down and to the left is better. A circle's area is decoding speed."
        "</figcaption></figure>\n"
    )


# ---- weights -------------------------------------------------------------------------------------------------------


def _heat_map(bundle: BundleReport) -> str:
    """The weights' own errors, and those of their products' outputs where the bundle's manifest has them."""
    weights = bundle.weights
    if all(w.error is None for w in weights):
        return f"<h3>{escape(bundle.name)}</h3>\n<p>{_NOTHING}</p>\n"
    outputs = [replace(w, error=w.output_error, rescaled=False) for w in weights]
    maps = _grid(weights, f"Error of each weight of {bundle.name}")
    if any(w.error is not None for w in outputs):
        maps += f"<p>{_OUTPUTS}</p>\n" + _grid(outputs, f"Error of each product's outputs in {bundle.name}")
    storage = escape(_storage(weights))
    return f'<article class="weights">\n<h3>{escape(bundle.name)} <small>{storage}</small></h3>\n{maps}</article>\n'


def _grid(weights: Sequence[WeightError], label: str) -> str:
    """Layers across and kinds of weights down; what stands outside the layers is below."""
    inside = [w for w in weights if w.layer is not None] or weights
    errors = [w.error for w in inside if w.error is not None] or [0.0]
    low, high = min(errors), max(errors)
    low = min(low, 0.8 * high)  # nearly equal errors should look so
    layers = sorted({w.layer for w in weights if w.layer is not None})
    by_place = {(w.kind, w.layer): w for w in weights}
    kinds = dict.fromkeys(w.kind for w in weights if w.layer is not None)
    head = "".join(f'<th scope="col">{layer}</th>' for layer in layers)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(kind)}</th>'
        + "".join(_cell(by_place.get((kind, layer)), low, high) for layer in layers)
        + "</tr>"
        for kind in kinds
    )
    grid = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
        f'<table class="heat"><thead><tr><th scope="col">layer</th>{head}</tr></thead>\n<tbody>{rows}</tbody></table>'
        "</div>\n"
        if layers
        else ""
    )
    outside = "".join(_outside(w, low, high) for w in weights if w.layer is None)
    return f'{grid}<div class="under">{outside}{_legend(low, high)}</div>\n'


_OUTPUTS = "What these errors change of each product's outputs, measured on the text that the bundle was calibrated on:"
_NOTHING = "No weight is stored in a way that can be set against the reference's."


def _cell(weight: WeightError | None, low: float, high: float) -> str:
    if weight is None:
        return "<td></td>"
    if weight.error is None:
        return f'<td title="{escape(weight.name)}: {escape(weight.stored)}, not comparable">–</td>'
    title = f"{weight.name}: {weight.error:.3%}, {weight.stored}{', rescaled' if weight.rescaled else ''}"
    return (
        f'<td style="--v:{_strength(weight.error, low, high)}%" title="{escape(title)}">{_percent(weight.error)}</td>'
    )


def _outside(weight: WeightError, low: float, high: float) -> str:
    if weight.error is None:
        return f'<span class="chip">{escape(weight.kind)} –</span>'
    return (
        f'<span class="chip" style="--v:{_strength(weight.error, low, high)}%">{escape(weight.kind)} '
        f"{100 * weight.error:.2g}%, {escape(weight.stored)}</span>"
    )


def _strength(error: float, low: float, high: float) -> int:
    """Percent of the strongest colour; letters stay readable up to 70. What stands outside the layers is clamped."""
    share = (error - low) / (high - low) if high > low else 0.0
    return round(6 + 64 * min(1.0, max(0.0, share)))


def _percent(error: float) -> str:
    """Two digits: thirty layers stand side by side."""
    value = 100 * error
    return (
        "0" if value == 0 else f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"[1:]
    )


def _legend(low: float, high: float) -> str:
    return f'<span class="legend">{100 * low:.2g}%<i></i>{100 * high:.2g}%</span>'


def _storage(weights: Sequence[WeightError]) -> str:
    """The layers' commonest storage first."""
    kinds = [w.stored for w in weights if w.layer is not None] or [w.stored for w in weights]
    return " and ".join(sorted(set(kinds), key=lambda k: (-kinds.count(k), k)))


# ---- tokens --------------------------------------------------------------------------------------------------------


def _differences(data: ReportData, bundles: Sequence[BundleReport]) -> str:
    intro = (
        "<p>Tokens of the text before which a bundle's prediction lies farthest from the reference's. Stronger marks "
        "are larger divergence; unmarked text was context. ↵ is a line's end, ␣ a space.</p>\n"
    )
    parts = []
    for i, bundle in enumerate(bundles):
        items = "\n".join(_difference(d, bundle.name, str(data.reference)) for d in bundle.differences)
        parts.append(
            f"<details{' open' if i == len(bundles) - 1 else ''}><summary><h3>{escape(bundle.name)}</h3></summary>\n"
            f'<ol class="tokens">\n{items}\n</ol></details>\n'
        )
    return intro + "".join(parts)


def _difference(d: Difference, name: str, reference: str) -> str:
    excerpt = "".join(_piece(piece, i == d.at) for i, piece in enumerate(d.excerpt))
    return (
        f'<li><p class="kl"><strong>{d.kl:.2f}</strong> nats <small>token {d.place:,}</small></p>'
        f'<div><p class="excerpt">{excerpt}</p>'
        f'<dl class="guesses">{_guess(reference, d.reference, d.token)}{_guess(name, d.bundle, d.token)}</dl>'
        "</div></li>"
    )


def _piece(piece: Piece, is_the_token: bool) -> str:
    text = escape(piece.text).replace("\n", '<i class="end">↵</i> ')
    if is_the_token:
        return f"<mark>{text}</mark>"
    shade = sum((piece.kl or 0) >= bound for bound in _SHADES)
    return f'<span class="k{shade}" title="KL {piece.kl:.2f}">{text}</span>' if shade else text


def _guess(name: str, guess: Guess, token: str) -> str:
    return (
        f"<dt>{escape(name)}</dt><dd>expected <code>{_visible(guess.likeliest)}</code>"
        f'<i class="bar" style="--w:{100 * guess.probability:.0f}%"></i>{_chance(guess.probability)}, '
        f"and gave the text's <code>{_visible(token)}</code> {_chance(guess.probability_of_token)}</dd>"
    )


def _visible(token: str) -> str:
    return escape(token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")) or "∅"


def _chance(p: float) -> str:
    return f"{p:.0%}" if p >= 0.0995 else f"{p:.1%}" if p >= 0.001 else f"{100 * p:.1g}%"


# ---- training ------------------------------------------------------------------------------------------------------


_LOW = 120  # pixels of the charts below the loss


def _run(run: RunReport) -> str:
    lines = [("loss", "s0", run.points)]
    held_out = ""
    if run.val_points:
        lines.append(("held out", "s1", run.val_points))
        held_out = f", {run.val_loss:.3f} held out"
    summary = f"{run.steps:,} steps, loss {run.loss:.3f}{held_out}"
    drawn = curve(lines, title=f"Loss of {run.name}", description=summary, y_label="loss, nats per token")
    below = "".join(_measure(run, name, label) for name, label in MEASURES.items() if name in run.measures)
    below = f'<div class="beside">{below}</div>\n' if below else ""
    return f"<h3>{escape(run.name)} <small>{summary}</small></h3>\n<figure>{drawn}</figure>\n{below}"


def _measure(run: RunReport, name: str, label: str) -> str:
    points = run.measures[name]
    values = [value for _, value in points]
    drawn = curve(
        [("", "s0", points)],
        title=f"{label} of {run.name}",
        description=f"from {min(values):.3g} to {max(values):.3g}, {values[-1]:.3g} in the end",
        y_label=label,
        height=_LOW,
    )
    return f"<figure>{drawn}</figure>"


def _footer(data: ReportData, version: str) -> str:
    made_by = f"<p>Made by gptedge {escape(version)}.</p>"
    if not data.bundles:
        return made_by
    notes = (
        f"Measured on {escape(str(data.text))}: {data.tokens:,} positions, each with at least half a window of context "
        f"(tokens {escape(str(data.ids_sha256))}).",
        "KL divergence in nats; the interval of the change is 95%, from the windows' spread.",
        "A weight's error is that of its stored values, ‖Wq − W‖ / ‖W‖, in percent, after fitting what a recipe "
        "rescaled; – where the two cannot be compared.",
        "Speed is greedy decoding after a short prompt on this machine "
        f"({data.threads} threads, {escape(str(data.provider))}).",
    )
    return f"<p>{' '.join(notes)}</p>{made_by}"
