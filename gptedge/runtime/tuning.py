"""How many threads run a bundle fastest on this machine: found by trying, and kept in a profile for the next time.

Threads share out a product's columns and attention's heads, so that their number should change no result; every trial
checks that to the last bit, and one that differs is not chosen. Longer or shorter guesses and another length from which
the graph for prompts is used do change last bits, and so tokens: they are not tuned. benchmarks/LOG.md says what was
tried and left.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptedge.bundle import Bundle
from gptedge.errors import UsageError
from gptedge.files import cache_folder, new_file, write_json
from gptedge.runtime.onnx_runtime import PROVIDERS, import_onnxruntime
from gptedge.runtime.session import Session
from gptedge.runtime.threads import checked_threads, default_threads

BUDGET_S = 3.0
"""No trial is begun that would end later than this."""
TRIALS = 4
"""Other numbers of threads that are tried, at most."""
_ROUNDS, _STEPS = 3, 6  # of decoding, by the usual number and the other in turn
_PROMPT = 32  # tokens before them
_WORTH = 0.95  # of the usual time; what gains less may be noise
_KEYS = ("threads", "measured_on")


@dataclass(frozen=True)
class Choice:
    threads: int
    source: str
    """given (by the caller), pinned (by a profile the caller named), tuned (by a profile kept here) or default."""


@dataclass(frozen=True)
class Trial:
    threads: int
    ratio: float
    """Of its time for a step to the usual number's."""
    equal: bool
    """Its logits are the usual number's, to the last bit."""


def choose_threads(bundle: Bundle, given: int | None, profile: Path | None, *, tuned: bool) -> Choice:
    """What the caller said, else what was found fastest here, where `tuned` allows it, else the physical cores.

    Raises UsageError when the profile is no profile, or both it and `given` are there.
    """
    if given is not None and profile is not None:
        raise UsageError(f"threads {given} and profile {profile} are both given; leave one of them out")
    if given is not None:
        return Choice(given, "given")
    if profile is not None:
        return Choice(_pinned(profile), "pinned")
    kept = _kept(bundle) if tuned else None
    return Choice(kept, "tuned") if kept else Choice(default_threads(), "default")


def tune(session: Session, *, load_s: float) -> list[Trial]:
    """Decode with fewer and fewer threads than `session` has, in sessions of their own; what `fastest` chooses from.

    `load_s` is how long opening a session takes: where no further one fits the 3 seconds, nothing is tried.
    """
    trials, start, cost_s = list[Trial](), time.perf_counter(), load_s
    for threads in fewer(session.threads) if session.provider == PROVIDERS["cpu"] else ():
        begun = time.perf_counter()
        if begun - start + cost_s > BUDGET_S:
            break
        other = Session(session.bundle, threads=threads, provider="cpu", check=False)
        try:
            trials.append(_trial(session, other))
        finally:
            other.close()
        cost_s = time.perf_counter() - begun
    return trials


def fewer(threads: int) -> list[int]:
    """Half as many, and half of that, down to one; at most `TRIALS` of them."""
    found: list[int] = []
    while threads > 1 and len(found) < TRIALS:
        threads //= 2
        found.append(threads)
    return found


def fastest(usual: int, trials: list[Trial]) -> int:
    """The number of threads to use: `usual` unless one is clearly faster and gives the same numbers."""
    good = [t for t in trials if t.equal and t.ratio < _WORTH]
    return min(good, key=lambda t: t.ratio).threads if good else usual


def keep(bundle: Bundle, threads: int) -> Path:
    """Write the profile that `choose_threads` finds; its path. Raises OSError where the cache cannot be written to."""
    facts = machine(bundle)
    path = _place(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as work:
        write_json(work, {"threads": threads, "measured_on": facts})
    return path


def machine(bundle: Bundle) -> dict[str, Any]:
    """What a measurement holds for: the processor, its cores as far as they may be used, onnxruntime and the graph."""
    return {
        "processor": _processor(),
        "cores": default_threads(),
        "onnxruntime": import_onnxruntime().__version__,
        "graph": {f.name: f.stat().st_size for f in sorted(bundle.path.iterdir()) if ".onnx" in f.name},
    }


def _trial(usual: Session, other: Session) -> Trial:
    caches = {session: session.new_cache() for session in (usual, other)}
    room = usual.context_length - _ROUNDS * _STEPS - 1
    prompt = [i % usual.vocab_size for i in range(max(1, min(_PROMPT, room)))]
    logits = {session: session.run(prompt, cache)[-1] for session, cache in caches.items()}
    equal = bool(np.array_equal(logits[usual], logits[other]))
    spent: dict[Session, list[float]] = {usual: [], other: []}
    for _ in range(_ROUNDS):
        tokens, rows = list[int](), dict[Session, list[Any]]()
        for session, cache in caches.items():
            begun, rows[session] = time.perf_counter(), []
            for i in range(min(_STEPS, usual.context_length - len(cache) - 1)):
                if session is usual:
                    tokens.append(int(logits[usual].argmax()))
                    logits[usual] = session.run(tokens[-1:], cache)[-1]
                    rows[session].append(logits[usual])
                else:
                    rows[session].append(session.run(tokens[i : i + 1], cache)[-1])
            spent[session].append(time.perf_counter() - begun)
        equal &= all(np.array_equal(a, b) for a, b in zip(rows[usual], rows[other], strict=True))
    return Trial(other.threads, round(min(spent[other]) / min(spent[usual]), 4), equal)


def _pinned(path: Path) -> int:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not JSON"
        raise UsageError(f"profile {path} cannot be read: {reason}; gptedge bench BUNDLE --tune makes one") from None
    if not isinstance(value, Mapping):
        raise UsageError(f'profile {path} is not a JSON object; {{"threads": 2}} would be one')
    if unknown := sorted(set(value) - set(_KEYS)):
        raise UsageError(f"profile {path} has {unknown[0]!r}, which is no setting; known is threads")
    return checked_threads(value.get("threads"), f"profile {path}: threads")


def _kept(bundle: Bundle) -> int | None:
    """The number of threads kept for this bundle on this machine; None where there is none, or nothing that holds."""
    facts = machine(bundle)
    with suppress(OSError, ValueError):  # a UsageError is a ValueError
        value = json.loads(_place(facts).read_text(encoding="utf-8"))
        if isinstance(value, dict) and value.get("measured_on") == facts:
            return checked_threads(value.get("threads"))
    return None


def _place(facts: Mapping[str, Any]) -> Path:
    import hashlib

    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_folder("profiles") / f"{key[:32]}.json"


def _processor() -> str:
    """The processor's name, as the system gives it."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if sys.platform == "win32":
        return os.environ.get("PROCESSOR_IDENTIFIER", "")
    wanted = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
    found: dict[str, str] = {}
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if not name.strip():
                break  # the first of them is enough
            if name.strip() in wanted:
                found[name.strip()] = value.strip()
    return " ".join(found.values()) or platform.machine()
