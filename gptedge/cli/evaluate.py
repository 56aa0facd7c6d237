"""gptedge eval: perplexity of a bundle, its distance from a reference, and how its replies compare with given ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptedge.cli.common import BundleArgument, Force, Json, MaxTokens, Threads, check_new_file, emit, needs, progress
from gptedge.cli.gates import (
    Baseline,
    Gates,
    MaxKld,
    MaxPplIncrease,
    MaxSizeMb,
    MinTop1,
    check_same_text,
    judge,
    requested,
)
from gptedge.config import SamplingParams
from gptedge.errors import UsageError
from gptedge.text import counted

if TYPE_CHECKING:
    from gptedge.evaluate.text_metrics import Pair
    from gptedge.model import Model


Context = Annotated[int | None, typer.Option(help="Tokens of a window (default 512, or the model's context).")]
MaxWindows = Annotated[int | None, typer.Option(help="Score only the first windows.")]


def command(
    bundle: BundleArgument,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to score.")] = None,
    reference: Annotated[Path | None, typer.Option(help="The bundle to compare with, as a rule the fp32 one.")] = None,
    context: Context = None,
    max_windows: MaxWindows = None,
    prompts: Annotated[
        bool,
        typer.Option("--prompts", help="Read the first half of each window by the graph for prompts, if there is one."),
    ] = False,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines of prompt and reference (and system, if any): BLEU, chrF and ROUGE of greedy replies."
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Ask --pairs through the chat template, or continue them (default: if it has one)."
        ),
    ] = None,
    max_tokens: MaxTokens = SamplingParams.max_tokens,
    out: Annotated[Path | None, typer.Option(help="JSON lines to write the replies to --pairs to.")] = None,
    max_ppl_increase: MaxPplIncrease = None,
    max_kld: MaxKld = None,
    min_top1: MinTop1 = None,
    max_size_mb: MaxSizeMb = None,
    baseline: Baseline = None,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure quality on a text, and on prompts with references."""
    gates = requested(max_ppl_increase, max_kld, min_top1, max_size_mb, baseline)
    if text is None and pairs is None:
        raise UsageError("there is nothing to measure on; give --text FILE, --pairs FILE, or both")
    if gates.needs_quality and (text is None or reference is None):
        raise UsageError("quality gates need --text FILE to measure on, and --reference BUNDLE to compare with")
    if reference is not None and text is None:
        raise UsageError("--reference is compared on a text; add --text FILE")
    if out is not None:
        _check_out(out, pairs, force=force)
    questions = _questions(pairs) if pairs else []
    facts: dict[str, Any] = {}
    if text is not None:
        facts |= measure(
            bundle,
            text,
            reference=reference,
            context=context,
            threads=threads,
            max_windows=max_windows,
            prompts=prompts,
        )
    if questions:
        facts |= _measure_pairs(bundle, questions, chat=chat, max_tokens=max_tokens, threads=threads, out=out)
    verdicts = judge(gates, facts, subject=str(bundle), as_json=as_json)
    try:
        emit({**facts, "gates": verdicts.as_json()}, as_json=as_json, lines=_lines(facts))
    finally:  # a failed gate fails, whether anybody reads of it or not
        verdicts.raise_if_failed()


def check_text(bundle: Path, text: Path, gates: Gates, *, context: int | None, max_windows: int | None) -> None:
    """Refuse a text that fills no window, or is not the baseline's, before a bundle is made to be measured on it."""
    from gptedge.bundle import open_bundle
    from gptedge.evaluate.divergence import Scores, cut, hash_of
    from gptedge.text import read_text
    from gptedge.tokenizer import Tokenizer

    longest = int(open_bundle(bundle).genai_config["model"]["context_length"])
    windows = cut(Tokenizer.from_folder(bundle).encode(read_text(text)), context, max_windows, longest)
    n_scored = len(windows) * len(Scores.scored(windows.shape[1]))
    check_same_text(gates, {"ids_sha256": hash_of(windows), "tokens": n_scored})


def measure(
    bundle: Path,
    text: Path,
    *,
    reference: Path | None,
    context: int | None,
    threads: int | None,
    max_windows: int | None = None,
    prompts: bool = False,
) -> dict[str, Any]:
    """The evaluation as JSON-ready data, with the bundle's size."""
    from gptedge.evaluate.divergence import check_same_tokens, evaluate
    from gptedge.loading import load
    from gptedge.text import read_text

    content = read_text(text)
    with load(bundle, threads=threads) as model:
        ids = model.tokenizer.encode(content)
        other = load(reference, threads=threads) if reference else None
        if other:
            check_same_tokens(model, other, content)
        with progress("eval") as report:
            result = evaluate(
                model.session,
                ids,
                reference=other.session if other else None,
                context=context,
                max_windows=max_windows,
                prompts=prompts,
                byte_length=lambda i: len(model.tokenizer.token_bytes(i)),
                report=report,
            )
        return {**result.as_json(), "size_mb": _size_mb(model)}


def _questions(path: Path) -> list[Pair]:
    """The pairs, when what scores them is installed: it is a pity to find that out after an hour of replies."""
    with needs("eval"):
        from gptedge.evaluate.text_metrics import read_pairs

    return read_pairs(path)


def _measure_pairs(
    bundle: Path, pairs: list[Pair], *, chat: bool | None, max_tokens: int, threads: int | None, out: Path | None
) -> dict[str, Any]:
    from gptedge.evaluate.text_metrics import compare, has_chat_template, replies
    from gptedge.loading import load

    with load(bundle, threads=threads) as model:
        chat = has_chat_template(model) if chat is None else chat
        if chat and not has_chat_template(model):
            raise UsageError(f"{bundle} has no chat template; leave --chat out, and prompts are continued")
        with progress("replies") as report:
            made = replies(model, pairs, chat=chat, max_tokens=max_tokens, report=report)
        size = _size_mb(model)
    if out is not None:
        _write_replies(out, pairs, made)
    return {**compare(made, [p.reference for p in pairs]).as_json(), "chat": chat, "size_mb": size}


def _check_out(out: Path, pairs: Path | None, *, force: bool) -> None:
    if pairs is None:
        raise UsageError("--out takes the replies to --pairs; give both")
    if out.resolve() == pairs.resolve():
        raise UsageError(f"--out {out} is the file of --pairs; choose another")
    check_new_file(out, force=force)


def _write_replies(out: Path, pairs: list[Pair], made: list[str]) -> None:
    from gptedge.files import new_file

    out.parent.mkdir(parents=True, exist_ok=True)
    with new_file(out) as work:
        rows = [
            {"prompt": pair.prompt, "reference": pair.reference, "prediction": reply}
            for pair, reply in zip(pairs, made, strict=True)
        ]
        work.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _size_mb(model: Model) -> float:
    return float(round(model.bundle.size_bytes / 1e6, 2))


def _lines(facts: dict[str, Any]) -> list[str]:
    return [*divergence_lines(facts), *_text_lines(facts)]


def divergence_lines(facts: dict[str, Any]) -> list[str]:
    if "perplexity" not in facts:
        return []
    bits = f"; {facts['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in facts else ""
    lines = [f"perplexity {facts['perplexity']:.3f} over {facts['tokens']:,} tokens{bits}"]
    if "kl_divergence" not in facts:
        return lines
    spread = "one window gives no interval"
    if "ppl_increase_interval" in facts:
        low, high = facts["ppl_increase_interval"]
        spread = f"95%: {low:+.2%} to {high:+.2%}"
    return [
        *lines,
        f"reference  {facts['reference_perplexity']:.3f}",
        f"change     {facts['ppl_increase']:+.2%} ({spread})",
        "KL         " + ", ".join(f"{name} {value:.4g}" for name, value in facts["kl_divergence"].items()),
        f"same top-1 {facts['top1_agreement']:.1%}",
    ]


def _text_lines(facts: dict[str, Any]) -> list[str]:
    if "bleu" not in facts:
        return []
    asked = "through the chat template" if facts["chat"] else "continued"
    return [
        f"replies    {counted(facts['pairs'], 'prompt')}, {asked}",
        f"BLEU       {facts['bleu']:.2f}    chrF {facts['chrf']:.2f}",
        f"ROUGE      1 {facts['rouge1']:.4f}, 2 {facts['rouge2']:.4f}, L {facts['rougeL']:.4f}",
        f"signatures {facts['sacrebleu']['bleu']}; {facts['sacrebleu']['chrf']}",
    ]
