"""Exporting one checkpoint with gptedge, optimum-cli and onnxruntime-genai's builder, in turn, in fresh processes.

    python benchmarks/export.py [CHECKPOINT] [--rounds 3]

CHECKPOINT is a Hugging Face folder with safetensors; without it, SmolLM2-135M-Instruct is pulled and written as one.
Prints seconds of the whole process, its peak memory (mapped files count) and the size of graph and weights: medians,
and gptedge's share of the better peer's. optimum-cli runs what it wrote once to check it, the builder checks nothing;
gptedge is run with verification, as users do, and without.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peers
import reference_model
import scoring

from gptedge.errors import GptEdgeError

OURS = ("gptedge", "gptedge --no-verify")
PEERS = ("optimum-cli", "genai builder")
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_mb: float
    size_mb: float


HEADINGS = {"seconds": "s", "peak_mb": "peak MB", "size_mb": "MB on disk"}


def commands(checkpoint: Path, out: Path) -> dict[str, list[str]]:
    gptedge = [sys.executable, "-P", "-m", "gptedge", "export", checkpoint, out]
    optimum = [peers.environment("optimum").with_name("optimum-cli"), "export", "onnx", "--model", checkpoint]
    builder = [peers.environment("genai-builder"), "-m", "onnxruntime_genai.models.builder", "-i", checkpoint]
    found = {
        "gptedge": gptedge,
        "gptedge --no-verify": [*gptedge, "--no-verify"],
        "optimum-cli": [*optimum, "--task", "text-generation-with-past", out],
        "genai builder": [*builder, "-o", out, "-c", out.with_name("cache"), "-p", "fp32", "-e", "cpu"],
    }
    return {name: list(map(str, words)) for name, words in found.items()}


def measure(name: str, command: Sequence[str], out: Path) -> Run:
    """One export, whose output is removed again. Raises PeerError with its last lines when it fails."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | peers.OFFLINE)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise peers.PeerError(f"{name} failed with {process.returncode}:\n{log.read().decode()[-1500:]}")
    size = scoring.size_mb(out)
    shutil.rmtree(out)
    return Run(seconds, usage.ru_maxrss * _RSS_UNIT / 1e6, size)


def table(runs: dict[str, list[Run]]) -> str:
    """Markdown: medians, then each of ours divided by the better peer."""
    columns = list(HEADINGS)
    medians = {n: {c: statistics.median(getattr(r, c) for r in got) for c in columns} for n, got in runs.items()}
    lines = [["", *HEADINGS.values()], ["---"] * (len(HEADINGS) + 1)]
    for name, row in medians.items():
        lines.append([name, f"{row['seconds']:.1f}", f"{row['peak_mb']:.0f}", f"{row['size_mb']:.1f}"])
    for name in OURS:
        shares = (medians[name][c] / min(medians[peer][c] for peer in PEERS) for c in columns)
        lines.append([f"{name} ÷ better peer", *(f"{share:.2f}" for share in shares)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the outputs go meanwhile; default: the system's place")
    a = parser.parse_args()
    if a.rounds < 1:
        parser.error(f"--rounds is {a.rounds}; it must be at least 1")
    with tempfile.TemporaryDirectory(prefix="gptedge-export-", dir=a.work) as folder:
        work = Path(folder)
        checkpoint = a.checkpoint or work / "checkpoint"
        try:
            if a.checkpoint is None:
                reference_model.make(checkpoint, seed=None)
            todo = commands(checkpoint, work / "out")
            runs: dict[str, list[Run]] = {name: [] for name in todo}
            for i in range(a.rounds + 1):  # the first round warms the disk's cache
                for name, command in todo.items():
                    got = measure(name, command, work / "out")
                    print(f"round {i}: {name}: {got.seconds:.1f} s", file=sys.stderr, flush=True)
                    runs[name] += [got] if i else []
        except (GptEdgeError, peers.PeerError) as e:
            sys.exit(str(e))
    print(f"{a.checkpoint or reference_model.MODEL}, medians of {a.rounds} rounds\n\n{table(runs)}")


if __name__ == "__main__":
    main()
