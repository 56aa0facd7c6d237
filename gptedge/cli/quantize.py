"""gptedge quantize: a smaller bundle, and gates that say whether it is still good enough."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gptedge.cli.common import BundleArgument, Force, Json, Threads, emit, needs, progress, say
from gptedge.cli.evaluate import Context, MaxWindows, check_text, divergence_lines, measure
from gptedge.cli.gates import Baseline, MaxKld, MaxPplIncrease, MaxSizeMb, MinTop1, judge, requested
from gptedge.errors import UsageError


def command(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new bundle's folder.")],
    recipe: Annotated[
        str, typer.Option(help="int8, int8-block, int8-weight, int4, int4-rtn, int4-distill, mixed, or a .toml file.")
    ] = "int8",
    target_mb: Annotated[float | None, typer.Option(help="Size of graph and weights that mixed fills, in MB.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text for recipes that learn from data (default: what the model writes itself).")
    ] = None,
    prefill: Annotated[
        str | None, typer.Option(help="int8: add a graph that reads prompts by 8-bit products, in files of its own.")
    ] = None,
    kv: Annotated[
        str | None, typer.Option(help="int8: keep keys and values in 8 bits, a quarter of the KV cache's memory.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to measure quality on, as eval does against the source.")
    ] = None,
    context: Context = None,
    max_windows: MaxWindows = None,
    max_ppl_increase: MaxPplIncrease = None,
    max_kld: MaxKld = None,
    min_top1: MinTop1 = None,
    max_size_mb: MaxSizeMb = None,
    baseline: Baseline = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws calibration text.")] = 0,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize a bundle's weights."""
    gates = requested(max_ppl_increase, max_kld, min_top1, max_size_mb, baseline)
    if gates.needs_quality and text is None:
        raise UsageError("quality gates need --text FILE to be measured on")
    if text is not None:
        check_text(bundle, text, gates, context=context, max_windows=max_windows)
    with needs("quantize"):
        from gptedge.quantize.quantizer import quantize
        from gptedge.quantize.work import kept_work
    try:
        with progress("quantize") as report:
            result = quantize(
                bundle,
                out,
                recipe=recipe,
                target_mb=target_mb,
                calibration=calibration,
                prefill=prefill,
                kv=kv,
                seed=seed,
                force=force,
                threads=threads,
                report=report,
            )
    except KeyboardInterrupt:
        if kept_work(out):
            say(f"gptedge: what was done for {out} is kept; the same command goes on with it")
        raise
    if prefill and not result.prefill_mb:
        say(f"gptedge: {recipe} reads prompts by 8-bit products itself, so that no graph for prompts was added")
    facts: dict[str, Any] = {"size_mb": result.size_mb}
    if text is not None:
        facts |= measure(out, text, reference=bundle, context=context, max_windows=max_windows, threads=threads)
    verdicts = judge(gates, facts, subject=str(out), as_json=as_json)
    value = {**facts, **asdict(result), "bundle": str(result.bundle), "gates": verdicts.as_json()}
    beside = f" and {result.prefill_mb:g} MB for prompts" if result.prefill_mb else ""
    cache = f", keys and values in {kv} ({result.kv_bytes_per_token} bytes a token)" if kv else ""
    lines = [f"{out}: {result.recipe}, {result.size_mb:g} MB{beside}{cache} in {result.seconds:g} s"]
    try:
        emit(value, as_json=as_json, lines=[*lines, *divergence_lines(facts)])
    finally:  # a failed gate fails, whether anybody reads of it or not
        verdicts.raise_if_failed()
