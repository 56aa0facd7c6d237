"""gptedge eval: perplexity of a bundle, and its distance from a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gptedge.cli.common import BundleArgument, Json, Threads, emit, progress
from gptedge.cli.gates import Baseline, MaxKld, MaxPplIncrease, MaxSizeMb, MinTop1, judge, requested
from gptedge.errors import UsageError


def command(
    bundle: BundleArgument,
    text: Annotated[Path, typer.Option(help="UTF-8 text to score.")],
    reference: Annotated[Path | None, typer.Option(help="The bundle to compare with, as a rule the fp32 one.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window (default 512, or the model's context).")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Score only the first windows.")] = None,
    max_ppl_increase: MaxPplIncrease = None,
    max_kld: MaxKld = None,
    min_top1: MinTop1 = None,
    max_size_mb: MaxSizeMb = None,
    baseline: Baseline = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure quality on a text."""
    gates = requested(max_ppl_increase, max_kld, min_top1, max_size_mb, baseline)
    if reference is None and gates.needs_quality:
        raise UsageError("quality gates need --reference BUNDLE to compare with")
    facts = measure(bundle, text, reference=reference, context=context, threads=threads, max_windows=max_windows)
    verdicts = judge(gates, facts)
    emit({**facts, "gates": verdicts.as_json()}, as_json=as_json, lines=_lines(facts))
    verdicts.raise_if_failed()


def measure(
    bundle: Path,
    text: Path,
    *,
    reference: Path | None,
    context: int | None,
    threads: int | None,
    max_windows: int | None = None,
) -> dict[str, Any]:
    """The evaluation as JSON-ready data, with the bundle's size."""
    from gptedge.evaluate.divergence import DEFAULT_CONTEXT, evaluate
    from gptedge.model import load
    from gptedge.text import read_text

    content = read_text(text)
    with load(bundle, threads=threads) as model:
        ids = model.tokenizer.encode(content)
        other = load(reference, threads=threads) if reference else None
        with progress("eval") as report:
            result = evaluate(
                model.session,
                ids,
                reference=other.session if other else None,
                context=context or DEFAULT_CONTEXT,
                max_windows=max_windows,
                report=report,
            )
        return {**result.as_json(), "size_mb": round(model.bundle.size_bytes / 1e6, 2)}


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"perplexity {facts['perplexity']:.3f} over {facts['tokens']} tokens"]
    if "kl_divergence" in facts:
        low, high = facts["ppl_increase_interval"]
        lines += [
            f"reference  {facts['reference_perplexity']:.3f}",
            f"change     {facts['ppl_increase']:+.2%} (95%: {low:+.2%} to {high:+.2%})",
            "KL         " + ", ".join(f"{name} {value:.4g}" for name, value in facts["kl_divergence"].items()),
            f"same top-1 {facts['top1_agreement']:.1%}",
        ]
    return lines
