"""Whether `mixed` is worth its measuring: at each size, its divergence against the line between uniform recipes.

    python benchmarks/mixed_sweep.py [--sizes 80,85,90] [--windows 4] [--work FOLDER]

The uniform recipes give every weight of the layers the same scheme: 4 bits in blocks of 128 with a 4-bit table, the
same with an 8-bit one, `int4`, and `int8-block`. Everything is calibrated and scored as in quality.py. Each size takes
as long as `mixed` does, some minutes; sizes that are done are printed as they come, so a run may be cut off.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import peers
import quality

from gptedge.errors import GptEdgeError

SIZES = (*range(80, 141, 5), 142)
_GROUP = '[[group]]\nmatch = "{}"\nbits = {}\nblock_size = {}\nsymmetric = {}\nsmooth = {}\nmethod = "{}"\n'
_LAYERS = _GROUP.format("*", 4, 128, "false", "false", "gptq")
UNIFORM = {
    "blocks of 128, 4-bit table": _GROUP.format("embed.weight", 4, 32, "true", "false", "gptq") + _LAYERS,
    "blocks of 128": _GROUP.format("embed.weight", 8, 64, "true", "true", "rtn") + _LAYERS,
}
"""Smaller than `int4`; `int4` and `int8-block` follow."""


def line_at(size_mb: float, points: Sequence[tuple[float, float]]) -> float:
    """The divergence that uniform recipes, points of (MB, KL), reach at a size: by straight lines between them.

    The nearest end's beyond them.
    """
    points = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= size_mb <= x1:
            return y0 + (y1 - y0) * (size_mb - x0) / (x1 - x0)
    return points[0][1] if size_mb < points[0][0] else points[-1][1]


def uniform_recipes(work: Path) -> Iterator[str]:
    for i, rows in enumerate(UNIFORM.values()):
        path = work / f"uniform{i}.toml"
        path.write_text(rows, encoding="utf-8")
        yield str(path)
    yield from ("int4", "int8-block")


def sweep(bench: quality.Bench, sizes: Sequence[float]) -> bool:
    """Prints a line for each size; whether `mixed` was never worse than the line."""
    uniform = [(r.size_mb, r.score.kl) for r in quality.rows(bench, list(uniform_recipes(bench.work)), ())]
    print("uniform: " + ", ".join(f"{mb:.1f} MB {kl:.4f}" for mb, kl in sorted(uniform)), flush=True)
    good = bool(uniform)
    for row in quality.rows(bench, [f"mixed --target-mb {size:g}" for size in sizes], ()):
        line = line_at(row.size_mb, uniform)
        good &= row.score.kl <= line
        verdict = "below" if row.score.kl <= line else "ABOVE"
        print(f"{row.name}: {row.size_mb:.1f} MB, KL {row.score.kl:.4f}, {verdict} the line's {line:.4f}", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="MB; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--calibration", type=Path, help="text; default: the standard library's docstrings")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where 4 GB of models go meanwhile; default: the system's place")
    a = parser.parse_args()
    try:
        sizes = [float(size) for size in a.sizes.split(",")]
    except ValueError:
        parser.error(f"--sizes is {a.sizes!r}; it must be numbers with commas between them")
    with tempfile.TemporaryDirectory(prefix="gptedge-sweep-", dir=a.work) as work:
        try:
            bench = quality.prepare(Path(work), a.seed, a.windows, a.calibration, a.threads)
        except (GptEdgeError, peers.PeerError) as e:
            sys.exit(str(e))
        sys.exit(0 if sweep(bench, sizes) else 1)


if __name__ == "__main__":
    main()
