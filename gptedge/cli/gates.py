"""Gates: bounds on quality and size that fail a build. One verdict a line on stderr, and exit code 4.

GitHub is told in its own way too (`github`): a summary of the job, and a mark for each gate that failed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gptedge.cli import github
from gptedge.cli.common import say
from gptedge.errors import GateFailed, UsageError
from gptedge.text import read_text

MaxPplIncrease = Annotated[str | None, typer.Option(metavar="P%", help="Fail if perplexity rises more, as 2% or 0.02.")]
MaxKld = Annotated[float | None, typer.Option("--max-kld", "--max-kl", help="Fail if mean KL divergence is larger.")]
MinTop1 = Annotated[
    str | None, typer.Option(metavar="P%", help="Fail if the likeliest tokens agree less often, as 95% or 0.95.")
]
Baseline = Annotated[Path | None, typer.Option(help="JSON that eval printed earlier: fail if anything is worse.")]
MaxSizeMb = Annotated[
    float | None, typer.Option(help="Fail if graph and weights are larger, in MB; a graph for prompts is apart.")
]


SAME_TEXT = ("ids_sha256", "tokens")
"""What tells whether two results are of the same tokens."""


@dataclass(frozen=True)
class Fact:
    """A measured number that gates look at."""

    label: str
    is_upper: bool
    """More is worse."""
    slack: float
    """How much of an earlier value a later one may be worse by: processors and seeds round differently."""
    interval: str = ""
    """Where its confidence interval stands, if it has one; half of that is room, too."""
    is_share: bool = False
    """Shown in percent."""

    def show(self, value: float) -> str:
        return f"{100 * value:.4g}%" if self.is_share else f"{value:.4g}"


FACTS = {
    "ppl_increase": Fact("perplexity increase", True, slack=0.05, interval="ppl_increase_interval", is_share=True),
    "kl_divergence.mean": Fact("mean KL divergence", True, slack=0.05),
    "top1_agreement": Fact("top-1 agreement", False, slack=0.01, is_share=True),
    "size_mb": Fact("size in MB", True, slack=0.01),
}
"""By where they stand in eval's JSON, in dotted keys."""


@dataclass(frozen=True)
class Gate:
    name: str
    key: str
    """Of FACTS."""
    bound: float


@dataclass(frozen=True)
class Gates:
    gates: tuple[Gate, ...]
    baseline: Path | None = None
    same_text: Mapping[str, Any] | None = None
    """What the baseline says of its text, by the keys in SAME_TEXT; some may be missing."""

    @property
    def needs_quality(self) -> bool:
        """Whether a text and a reference are needed."""
        return any(g.key != "size_mb" for g in self.gates)


@dataclass(frozen=True)
class Verdict:
    gate: Gate
    value: float

    @property
    def ok(self) -> bool:
        """False, too, for a value that is not a number."""
        upper = FACTS[self.gate.key].is_upper
        return self.value <= self.gate.bound if upper else self.value >= self.gate.bound

    def cells(self) -> tuple[str, str, str, str]:
        """Gate, value, bound and verdict, for people."""
        fact = FACTS[self.gate.key]
        bound = f"{'at most' if fact.is_upper else 'at least'} {fact.show(self.gate.bound)}"
        return self.gate.name, fact.show(self.value), bound, "ok" if self.ok else "FAILED"

    def complaint(self) -> str:
        fact = FACTS[self.gate.key]
        return f"{fact.label} is {fact.show(self.value)}, and misses the bound of {self.cells()[2]}"


@dataclass(frozen=True)
class Verdicts:
    all: tuple[Verdict, ...]

    def as_json(self) -> list[dict[str, Any]]:
        return [{"name": v.gate.name, "value": v.value, "bound": v.gate.bound, "ok": v.ok} for v in self.all]

    @property
    def failed(self) -> list[Verdict]:
        return [v for v in self.all if not v.ok]

    def raise_if_failed(self) -> None:
        if self.failed:
            raise GateFailed("; ".join(f"gate {v.gate.name}: {v.complaint()}" for v in self.failed))


def requested(
    max_ppl_increase: str | None,
    max_kld: float | None,
    min_top1: str | None,
    max_size_mb: float | None,
    baseline: Path | None = None,
) -> Gates:
    """Gates for those options that were given. Raises UsageError for a bound that is not a number."""
    rows = (
        ("max-ppl-increase", "ppl_increase", _fraction("--max-ppl-increase", max_ppl_increase)),
        ("max-kld", "kl_divergence.mean", max_kld),
        ("min-top1", "top1_agreement", _fraction("--min-top1", min_top1)),
        ("max-size-mb", "size_mb", max_size_mb),
    )
    gates = [Gate(name, key, bound) for name, key, bound in rows if bound is not None]
    bad = next((g for g in gates if not math.isfinite(g.bound)), None)
    if bad:
        raise UsageError(f"--{bad.name} is {bad.bound}; give a number")
    never = next((g for g in gates if g.name in ("max-kld", "max-size-mb") and g.bound < 0), None)
    if never:
        raise UsageError(f"--{never.name} is {never.bound:g}; nothing is below 0")
    if baseline is None:
        return Gates(tuple(gates))
    earlier = _read_baseline(baseline)
    return Gates((*gates, *_no_worse_than(earlier, baseline)), baseline, earlier)


def _read_baseline(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise UsageError(f"baseline {path} is not JSON ({e}); give what eval --json printed") from None
    if not isinstance(value, dict):
        raise UsageError(f"baseline {path} holds {type(value).__name__}, not an object; give what eval --json printed")
    return value


def _no_worse_than(earlier: Mapping[str, Any], path: Path) -> list[Gate]:
    """Gates at the values of an earlier result, with some room."""
    gates = []
    for key, fact in FACTS.items():
        value = _look_up(earlier, key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UsageError(
                f"baseline {path} has {'no' if value is None else repr(value) + ' as'} {key}; "
                "make it with gptedge eval --text FILE --reference BUNDLE --json"
            )
        room = max(fact.slack * abs(value), _half(earlier.get(fact.interval)))
        gates.append(Gate(f"baseline {key}", key, value + room if fact.is_upper else value - room))
    return gates


def _half(interval: Any) -> float:
    """Of an interval's width; 0 of anything else."""
    match interval:
        case [int() | float() as low, int() | float() as high] if math.isfinite(high - low):
            return max(0.0, (high - low) / 2)
    return 0.0


def _look_up(facts: Mapping[str, Any], dotted: str) -> Any:
    value: Any = facts
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def judge(gates: Gates, facts: Mapping[str, Any], *, subject: str, as_json: bool) -> Verdicts:
    """Compare, and say each verdict on stderr; under GitHub Actions, tell GitHub.

    `subject` names what is judged; `as_json` keeps stdout for the one object.
    Raises UsageError when the baseline is of another text.
    """
    check_same_text(gates, facts)
    verdicts = Verdicts(tuple(Verdict(g, float(_look_up(facts, g.key))) for g in gates.gates))
    for verdict in verdicts.all:
        name, value, bound, word = verdict.cells()
        say(f"gate {name}: {value}, {bound}: {word}")
    if verdicts.all:
        github.summarize(subject, [v.cells() for v in verdicts.all], facts)
    with suppress(BrokenPipeError):  # the verdict counts, whoever reads it
        for verdict in verdicts.failed:
            github.mark_error(f"gptedge gate {verdict.gate.name}", f"{subject}: {verdict.complaint()}", as_json=as_json)
    return verdicts


def check_same_text(gates: Gates, facts: Mapping[str, Any]) -> None:
    """Raises UsageError when the baseline is of another text; `facts` has SAME_TEXT."""
    for key in SAME_TEXT:
        then, now = (gates.same_text or {}).get(key), facts.get(key)
        if then is not None and then != now:
            raise UsageError(
                f"baseline {gates.baseline} was measured on other tokens ({key} was {then}, and is {now}); "
                "use the same text, tokenizer, --context and --max-windows, or make the baseline again"
            )


def _fraction(option: str, text: str | None) -> float | None:
    """2% and 0.02 are the same; 2 may be meant as either, and is refused."""
    if text is None:
        return None
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value) or (abs(value) > 1 and not text.endswith("%")):
        raise UsageError(f"{option} is {text!r}; give a percentage such as 2%, or a fraction such as 0.02")
    return value
