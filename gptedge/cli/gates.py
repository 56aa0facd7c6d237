"""Gates: bounds on quality and size that fail a build. One verdict a line on stderr, and exit code 4."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gptedge.cli.common import say
from gptedge.errors import DataError, GateFailed, UsageError
from gptedge.text import read_text

MaxPplIncrease = Annotated[str | None, typer.Option(metavar="P%", help="Fail if perplexity rises more, as 2% or 0.02.")]
MaxKld = Annotated[float | None, typer.Option("--max-kld", "--max-kl", help="Fail if mean KL divergence is larger.")]
MinTop1 = Annotated[
    str | None, typer.Option(metavar="P%", help="Fail if the likeliest tokens agree less often, as 95% or 0.95.")
]
Baseline = Annotated[Path | None, typer.Option(help="JSON that eval printed earlier: fail if anything is worse.")]
MaxSizeMb = Annotated[float | None, typer.Option(help="Fail if graph and weights are larger, in MB.")]


BASELINE_SLACK = 0.02
_BASELINE_FACTS = {"ppl_increase": True, "kl_divergence.mean": True, "top1_agreement": False, "size_mb": True}
"""What --baseline compares, and whether more is worse."""


@dataclass(frozen=True)
class Gate:
    name: str
    fact: str
    """Where the measured value stands, in dotted keys."""
    bound: float
    is_upper: bool


@dataclass(frozen=True)
class Gates:
    gates: tuple[Gate, ...]

    @property
    def needs_quality(self) -> bool:
        """Whether a text and a reference are needed."""
        return any(g.fact != "size_mb" for g in self.gates)


@dataclass(frozen=True)
class Verdict:
    name: str
    value: float
    bound: float
    ok: bool


@dataclass(frozen=True)
class Verdicts:
    all: tuple[Verdict, ...]

    def as_json(self) -> list[dict[str, Any]]:
        return [vars(v) for v in self.all]

    def raise_if_failed(self) -> None:
        failed = [v for v in self.all if not v.ok]
        if failed:
            raise GateFailed("; ".join(f"{v.name}: {v.value:.4g} misses the bound {v.bound:.4g}" for v in failed))


def requested(
    max_ppl_increase: str | None,
    max_kld: float | None,
    min_top1: str | None,
    max_size_mb: float | None,
    baseline: Path | None = None,
) -> Gates:
    """Gates for those options that were given."""
    rows = (
        ("max-ppl-increase", "ppl_increase", _fraction("--max-ppl-increase", max_ppl_increase), True),
        ("max-kld", "kl_divergence.mean", max_kld, True),
        ("min-top1", "top1_agreement", _fraction("--min-top1", min_top1), False),
        ("max-size-mb", "size_mb", max_size_mb, True),
    )
    gates = [Gate(name, fact, bound, upper) for name, fact, bound, upper in rows if bound is not None]
    return Gates(tuple(gates + _no_worse_than(baseline)))


def _no_worse_than(baseline: Path | None) -> list[Gate]:
    """Gates at the values of an earlier result, with BASELINE_SLACK of room, since processors round differently."""
    if baseline is None:
        return []
    try:
        facts = json.loads(read_text(baseline))
    except ValueError as e:
        raise DataError(f"{baseline} is not JSON: {e}") from None
    gates = []
    for fact, is_upper in _BASELINE_FACTS.items():
        value = _look_up(facts, fact) if isinstance(facts, dict) else None
        if isinstance(value, (int, float)):
            room = BASELINE_SLACK * abs(value)
            gates.append(Gate(f"baseline {fact}", fact, value + room if is_upper else value - room, is_upper))
    if not gates:
        raise DataError(f"{baseline} has none of {', '.join(_BASELINE_FACTS)}; give what eval --json printed")
    return gates


def _look_up(facts: Mapping[str, Any], dotted: str) -> Any:
    value: Any = facts
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def judge(gates: Gates, facts: Mapping[str, Any]) -> Verdicts:
    """Compare and say each verdict on stderr. A value that is not a number fails."""
    verdicts = []
    for gate in gates.gates:
        value = _look_up(facts, gate.fact)
        ok = bool(value <= gate.bound if gate.is_upper else value >= gate.bound)
        verdicts.append(Verdict(gate.name, float(value), gate.bound, ok))
        sign = "<=" if gate.is_upper else ">="
        say(f"gate {gate.name}: {value:.4g} {sign} {gate.bound:.4g}: {'ok' if ok else 'FAILED'}")
    return Verdicts(tuple(verdicts))


def _fraction(option: str, text: str | None) -> float | None:
    """2% and 0.02 are the same."""
    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise UsageError(f"{option} is {text!r}; give a percentage such as 2%, or a fraction such as 0.02") from None
