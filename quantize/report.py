"""What a report shows of bundles, measured: size, distance from a reference, speed, the error of each weight, and the
tokens where two models differ most; and training runs. `report_page` makes a page of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptedge.bundle import GRAPH, open_bundle
from gptedge.errors import BundleError, UsageError
from gptedge.evaluate.bench import decode_speed
from gptedge.evaluate.divergence import Evaluation, Scores, check_same_tokens, score, summarize
from gptedge.loading import load
from gptedge.model import Model
from gptedge.progress import Report, silent
from gptedge.quantize.recipes import FLOAT_RECIPES
from gptedge.quantize.report_runs import METRICS, RunReport, read_run
from gptedge.quantize.report_weights import WeightError, weight_errors
from gptedge.tokenizer import Tokenizer

DEFAULT_WINDOWS = 8
_N_DIFFERENCES = 8
_BEFORE, _AFTER = 40, 12  # tokens of an excerpt around the one that differs


@dataclass(frozen=True)
class Guess:
    """What a model thought would come."""

    likeliest: str
    probability: float
    """Of the likeliest token."""
    probability_of_token: float
    """Of the token that came."""


@dataclass(frozen=True)
class Piece:
    text: str
    kl: float | None
    """None where the position is not scored."""


@dataclass(frozen=True)
class Difference:
    """A token before which the two models thought differently."""

    place: int
    """In the text, counted in tokens."""
    token: str
    kl: float
    reference: Guess
    bundle: Guess
    excerpt: list[Piece]
    at: int
    """Which piece of the excerpt the token is."""


@dataclass(frozen=True)
class BundleReport:
    name: str
    path: str
    recipe: str
    is_reference: bool
    size_mb: float
    decode_tokens_per_s: float
    perplexity: float
    ppl_increase: float
    ppl_increase_interval: tuple[float, float] | None
    kl_divergence: dict[str, float] | None
    """None of the reference."""
    top1_agreement: float | None
    weights: list[WeightError]
    differences: list[Difference]


@dataclass(frozen=True)
class ReportData:
    reference: str | None
    text: str | None
    """What was measured on."""
    tokens: int
    """Positions scored."""
    ids_sha256: str | None
    threads: int | None
    provider: str | None
    bundles: list[BundleReport]
    runs: list[RunReport]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# ---- which folders -------------------------------------------------------------------------------------------------


def find(folders: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Bundles, and training runs, among the folders or right inside them; each once, in the order given."""
    bundles: dict[Path, Path] = {}
    runs: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
        inside = [folder] if _is_either(folder) else sorted(f for f in folder.iterdir() if f.is_dir() and _is_either(f))
        if not inside:
            raise BundleError(
                f"{folder} holds no bundle (a folder with {GRAPH}) and no training run (one with {METRICS})"
            )
        for path in inside:
            (bundles if (path / GRAPH).is_file() else runs).setdefault(path.resolve(), path)
    return list(bundles.values()), list(runs.values())


def _is_either(folder: Path) -> bool:
    return not folder.name.startswith(".") and any((folder / name).is_file() for name in (GRAPH, METRICS))


def choose_reference(bundles: Sequence[Path], given: Path | None) -> Path:
    """The given one, or the only bundle of float weights, fp32 before fp16."""
    if given is not None:
        return given
    for recipe in FLOAT_RECIPES:
        found = [path for path in bundles if open_bundle(path).recipe == recipe]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(map(str, found))
            raise UsageError(f"{len(found)} bundles are {recipe} ({names}); say which one to compare with: --reference")
    raise UsageError("none of the bundles is fp32 or fp16; give the one to compare with: --reference BUNDLE")


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, or their whole paths where names are not enough."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


# ---- measuring -----------------------------------------------------------------------------------------------------


def collect(
    folders: Iterable[Path],
    *,
    text: str,
    text_name: str,
    reference: Path | None = None,
    context: int | None,
    max_windows: int = DEFAULT_WINDOWS,
    threads: int | None = None,
    report: Report = silent,
) -> ReportData:
    """Measure every bundle against the reference on `text`, which counts as one of them; read every run.

    Raises BundleError, UsageError or DataError for folders that are neither, bundles that cannot be compared, and texts
    that are too short.
    """
    bundles, run_folders = find(folders)
    runs = [read_run(path, name) for path, name in zip(run_folders, _names(run_folders), strict=True)]
    if not bundles and reference is None:
        return ReportData(None, None, 0, None, None, None, [], runs)
    reference = choose_reference(bundles, reference)
    bundles = [reference, *(path for path in bundles if path.resolve() != reference.resolve())]
    made: list[BundleReport] = []
    with load(reference, threads=threads) as original:
        ids = original.tokenizer.encode(text)
        size: dict[str, Any] = {"context": context, "max_windows": max_windows}
        for i, (path, name) in enumerate(zip(bundles, _names(bundles), strict=True)):

            def windows(done: int, total: int, note: str, i: int = i, name: str = name) -> None:
                report(i * total + done, len(bundles) * total, name)

            if i == 0:
                plain = summarize(score(original.session, ids, report=windows, **size))
                made.append(_reference_report(original, name, plain))
                continue
            with load(path, threads=threads) as model:
                check_same_tokens(model, original, text)
                scores = score(model.session, ids, reference=original.session, report=windows, **size)
                made.append(_bundle_report(model, original, name, scores))
        return ReportData(
            reference=made[0].name,
            text=text_name,
            tokens=plain.tokens,
            ids_sha256=plain.ids_sha256,
            threads=original.session.threads,
            provider=original.session.provider,
            bundles=made,
            runs=runs,
        )


def _reference_report(model: Model, name: str, result: Evaluation) -> BundleReport:
    return BundleReport(
        **_facts(model, name),
        is_reference=True,
        perplexity=result.perplexity,
        ppl_increase=0.0,
        ppl_increase_interval=None,
        kl_divergence=None,
        top1_agreement=None,
        weights=[],
        differences=[],
    )


def _bundle_report(model: Model, original: Model, name: str, scores: Scores) -> BundleReport:
    result = summarize(scores)
    assert result.ppl_increase is not None
    return BundleReport(
        **_facts(model, name),
        is_reference=False,
        perplexity=result.perplexity,
        ppl_increase=result.ppl_increase,
        ppl_increase_interval=result.ppl_increase_interval,
        kl_divergence=result.kl_divergence,
        top1_agreement=result.top1_agreement,
        weights=weight_errors(model.bundle.path, original.bundle.path),
        differences=differences(scores, original.tokenizer),
    )


def _facts(model: Model, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "path": str(model.bundle.path),
        "recipe": model.bundle.recipe,
        "size_mb": round(model.bundle.size_bytes / 1e6, 2),
        "decode_tokens_per_s": decode_speed(model.session),
    }


# ---- where the models differ ---------------------------------------------------------------------------------------


def differences(scores: Scores, tokenizer: Tokenizer) -> list[Difference]:
    """The positions of largest divergence, largest first; excerpts do not overlap."""
    assert scores.kl is not None
    places = scores.places()
    taken: list[int] = []
    for i in np.argsort(-scores.kl, kind="stable").tolist():
        if all(abs(places[i] - places[j]) > _BEFORE for j in taken):
            taken.append(i)
        if len(taken) == _N_DIFFERENCES:
            break
    kl_of = dict(zip(places.tolist(), scores.kl.tolist(), strict=True))
    return [_difference(scores, tokenizer, i, int(places[i]), kl_of) for i in taken]


def _difference(scores: Scores, tokenizer: Tokenizer, i: int, place: int, kl_of: dict[int, float]) -> Difference:
    assert scores.reference is not None
    context = scores.ids.shape[1]
    window, flat = place // context, scores.ids.ravel()
    start = max(window * context, place - _BEFORE)
    stop = min((window + 1) * context, place + 1 + _AFTER)
    decoder = tokenizer.decode_stream()
    pieces = [Piece(decoder.step(int(flat[j])), kl_of.get(j)) for j in range(start, stop)]

    def guess(side: Any) -> Guess:
        likeliest = tokenizer.decode([int(side.top[i])], skip_special_tokens=False)
        return Guess(likeliest, float(np.exp(side.top_logprob[i])), float(np.exp(-side.nll[i])))

    return Difference(
        place=place,
        token=tokenizer.decode([int(flat[place])], skip_special_tokens=False),
        kl=kl_of[place],
        reference=guess(scores.reference),
        bundle=guess(scores.model),
        excerpt=pieces,
        at=place - start,
    )
