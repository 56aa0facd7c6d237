"""What quantizing costs, for gptedge and its peers: one model, the same tokens, size against divergence.

    python benchmarks/quality.py [--windows 16] [--recipes int8,int4-rtn] [--peers genai,llama-cpp] [--write]
                                 [--bundle FOLDER]

Makes the reference (reference_model.py), quantizes it with every recipe of gptedge, onnxruntime-genai's builder and
llama.cpp, scores each against the fp32 model (scoring.py) on Python's language reference, and prints a table. Recipes
that learn from text get the standard library's docstrings, which lie near that reference; --calibration names another.
--write puts the table into README.md and README.zh-CN.md, and the plot into docs/quality.svg. A recipe may carry
options of `gptedge quantize`: --recipes "int8,mixed --target-mb 105". --bundle scores one that was made before, from
the same reference and calibration text: int4-distill, which takes an hour.

Quantizing is timed as the tools are used: gptedge's command from an fp32 bundle, genai's builder from the checkpoint
(it exports and quantizes in one), llama.cpp's call from an fp32 GGUF file, without an importance matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import chart
import numpy as np
import peers
import reference_model
import scoring

from gptedge.bundle import open_bundle
from gptedge.errors import GptEdgeError

ROOT = Path(__file__).resolve().parent.parent
PLOT = "docs/quality.svg"
LLAMA_CPP_PROGRAM = Path(__file__).with_name("llama_cpp_program.py")
WINDOWS, WINDOW = 16, 512
PEERS = ("genai", "llama-cpp")
TARGETS_MB = (80, 92, 105)
"""What a recipe fills that is made for a size: as much as `int4`, `int4-distill` and llama.cpp's Q4_K_M."""
KINDS = ("gptedge", "onnxruntime-genai", "llama.cpp")

# Name -> precision and further options of the builder.
GENAI = {
    "genai int8": ("int8",),
    "genai int4": ("int4",),
    "genai int4 k_quant": ("int4", "algo_config=k_quant"),
    "genai int4 k_quant_mixed": ("int4", "algo_config=k_quant_mixed"),
}
# Name -> llama.cpp's number of the kind of file.
LLAMA_CPP = {"llama.cpp Q8_0": 7, "llama.cpp Q4_K_M": 15, "llama.cpp Q4_0": 2}
_SAME_MODEL_KL = 1e-4  # of the fp32 GGUF file, whose KV cache is fp16


@dataclass(frozen=True)
class Page:
    headings: tuple[str, ...]
    intro: str
    """`positions` is put in."""


PAGES = {
    "README.md": Page(
        ("", "MB", "perplexity", "KL", "same top token"),
        "One model, the same tokens ({positions:,} positions), run by onnxruntime or llama.cpp; nearest to fp32 first. "
        "Judged on Python's language reference; what learns from data saw the standard library's docstrings "
        "before, llama.cpp had no importance matrix. `make bench-quality` measures it anew.",
    ),
    "README.zh-CN.md": Page(
        ("", "MB", "困惑度", "KL", "首选 token 相同"),
        "同一个模型、同样的 token（{positions:,} 个位置），由 onnxruntime 或 llama.cpp 运行；越靠前越接近 fp32。"
        "在 Python 语言参考上评测；需要数据的配方事先见过标准库的文档字符串，llama.cpp 没有用重要性矩阵。"
        "用 `make bench-quality` 可重新测量。",
    ),
}


@dataclass(frozen=True)
class Row:
    name: str
    kind: int
    size_mb: float
    seconds: float | None
    """None where it was made before."""
    score: scoring.Score


@dataclass(frozen=True)
class Bench:
    """What every row is made from and judged by."""

    work: Path
    checkpoint: Path
    gguf: Path
    fp32: Path
    windows: list[list[int]]
    reference: Path
    """Logits of the fp32 bundle, [windows, rows, vocabulary]."""
    calibration: Path
    """Text for those of our recipes that learn from some."""
    threads: int

    def row(self, name: str, kind: int, made: Path, seconds: float | None, logits: Iterator[scoring.Floats]) -> Row:
        score = scoring.score(self.windows, logits, np.load(self.reference, mmap_mode="r"))
        return Row(name, kind, scoring.size_mb(made), seconds, score)


def prepare(work: Path, seed: int, count: int, calibration: Path | None, threads: int) -> Bench:
    """The reference in three formats, and its logits."""
    checkpoint, gguf, fp32 = work / "checkpoint", work / "reference.gguf", work / "fp32"
    reference_model.make(checkpoint, seed=seed, gguf_file=gguf)
    gptedge("export", checkpoint, fp32, "--no-verify")
    windows = scoring.cut(evaluation_ids(checkpoint), count, WINDOW)
    reference = work / "reference.npy"
    save(reference, scoring.graph_logits(fp32, windows, threads), count)
    if calibration is None:
        calibration = work / "calibration.txt"
        calibration.write_text(calibration_text(), encoding="utf-8")
    return Bench(work, checkpoint, gguf, fp32, windows, reference, calibration, threads)


def save(path: Path, logits: Iterator[scoring.Floats], count: int) -> None:
    """Window by window: sixteen of a vocabulary of 49,152 are 800 MB."""
    first = next(logits)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, *first.shape))
    for i, window in enumerate(chain([first], logits)):
        out[i] = window
    out.flush()


def evaluation_ids(checkpoint: Path) -> list[int]:
    """Python's language reference, which every Python brings along, as the model's tokens."""
    from pydoc_data.topics import topics

    from gptedge.tokenizer import Tokenizer

    return Tokenizer.from_folder(checkpoint).encode("\n\n".join(topics[name] for name in sorted(topics)))


# ---- the tools -----------------------------------------------------------------------------------------------------


def gptedge(*arguments: object) -> float:
    """Seconds that one of our commands took, in a process of its own."""
    return run([sys.executable, "-P", "-m", "gptedge", *arguments])


def run(command: Sequence[object]) -> float:
    """Seconds that a command took. Raises PeerError with its last lines when it fails."""
    start = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | peers.OFFLINE)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip()[-1500:]
        raise peers.PeerError(f"{shlex.join(map(str, command[1:6]))} … failed with {done.returncode}:\n{lines}")
    return time.perf_counter() - start


def calibration_text() -> str:
    """The docstrings of the standard library, and nothing of the language reference that is scored."""
    from pydoc_data.topics import topics

    from gptedge.train.stdlib import stdlib_corpus

    scored = {text.strip() for text in topics.values()}
    return "\n\n".join(text for text in stdlib_corpus() if text.strip() not in scored)


def gptedge_row(bench: Bench, name: str, options: Sequence[str]) -> Row:
    out = bench.work / "quantized"
    shared = ("--threads", bench.threads, "--calibration", bench.calibration)
    seconds = gptedge("quantize", bench.fp32, out, *shared, *options)
    return bench.row(name, 0, out, seconds, scoring.graph_logits(out, bench.windows, bench.threads))


def bundle_row(bench: Bench, name: str, bundle: Path) -> Row:
    return bench.row(name, 0, bundle, None, scoring.graph_logits(bundle, bench.windows, bench.threads))


def genai_row(bench: Bench, name: str, options: Sequence[str]) -> Row:
    out, cache = bench.work / "quantized", bench.work / "cache"
    precision, *extra = options
    command = [peers.environment("genai-builder"), "-m", "onnxruntime_genai.models.builder", "-i", bench.checkpoint]
    command += ["-o", out, "-c", cache, "-p", precision, "-e", "cpu", *(["--extra_options", *extra] if extra else [])]
    seconds = run(command)
    return bench.row(name, 1, out, seconds, scoring.graph_logits(out, bench.windows, bench.threads))


def llama_cpp_row(bench: Bench, name: str, kind: int | None) -> Row:
    """`kind` None: the fp32 file as it is."""
    logits, out = bench.work / "llama_cpp.npy", bench.work / "quantized.gguf" if kind is not None else bench.gguf
    work = {
        "source": str(bench.gguf),
        "model": str(out),
        "type": kind,
        "windows": bench.windows,
        "first_row": scoring.scored_rows(WINDOW).start,
        "threads": bench.threads,
        "logits": str(logits),
    }
    seconds = peers.run_json("llama-cpp", LLAMA_CPP_PROGRAM, work)["seconds"]
    return bench.row(name, 2, out, seconds, iter(np.load(logits, mmap_mode="r")))


def check_gguf(bench: Bench) -> None:
    """The GGUF file must be the same model, or llama.cpp would be judged on another one."""
    kl = llama_cpp_row(bench, "llama.cpp fp32", None).score.kl
    if not kl < _SAME_MODEL_KL:
        raise peers.PeerError(f"the fp32 GGUF file has KL {kl:.2g} from the fp32 bundle; at most {_SAME_MODEL_KL:g}")


def rows(bench: Bench, recipes: Sequence[str], tools: Sequence[str], bundles: Sequence[Path] = ()) -> Iterator[Row]:
    """A row for everything that works; what does not is named on stderr."""
    jobs: list[tuple[str, Callable[[], Row | None]]] = [
        (name, partial(gptedge_row, bench, name, ["--recipe", *shlex.split(recipe)]))
        for recipe in recipes
        for name in [f"gptedge {recipe}"]
    ]
    for folder in bundles:
        name = f"gptedge {open_bundle(folder).recipe}"
        jobs.append((name, partial(bundle_row, bench, name, folder)))
    if "genai" in tools:
        jobs += [(name, partial(genai_row, bench, name, options)) for name, options in GENAI.items()]
    if "llama-cpp" in tools:
        jobs.append(("llama.cpp fp32", partial(check_gguf, bench)))
        jobs += [(name, partial(llama_cpp_row, bench, name, kind)) for name, kind in LLAMA_CPP.items()]
    for name, job in jobs:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            if row := job():
                made = "" if row.seconds is None else f", made in {row.seconds:.0f} s"
                print(f"{name}: KL {row.score.kl:.4f}{made}", file=sys.stderr, flush=True)
                yield row
        except peers.PeerError as e:
            print(f"{name} is left out: {e}", file=sys.stderr)
        finally:
            shutil.rmtree(bench.work / "quantized", ignore_errors=True)
            (bench.work / "quantized.gguf").unlink(missing_ok=True)


# ---- what comes out ------------------------------------------------------------------------------------------------


def table(found: Sequence[Row], headings: Sequence[str]) -> str:
    """Markdown, nearest to the reference first."""
    lines = [" | ".join(headings), " | ".join(["---"] * len(headings))]
    for row in sorted(found, key=lambda r: r.score.kl):
        s = row.score
        name = f"**{row.name}**" if row.kind == 0 else row.name
        cells = (name, f"{row.size_mb:.1f}", f"{s.ppl_increase:+.2%}", f"{s.kl:.4f}", f"{s.top1:.1%}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def plot(found: Sequence[Row]) -> str:
    ends = [re.sub(r"^(gptedge|genai|llama\.cpp) ", "", row.name) for row in found]
    points = [chart.Point(end, r.kind, r.size_mb, r.score.kl) for end, r in zip(ends, found, strict=True)]
    return chart.scatter(points, KINDS, x_title="MB", y_title="mean KL divergence from fp32, nats")


def write(found: Sequence[Row], root: Path = ROOT) -> None:
    """Put the table between the marks of both README files, and the plot where they show it."""
    for name, page in PAGES.items():
        text = (root / name).read_text(encoding="utf-8")
        intro = page.intro.format(positions=found[0].score.positions)
        content = f"{intro}\n\n{table(found, page.headings)}\n\n![{', '.join(KINDS)}]({PLOT})\n"
        (root / name).write_text(between_marks(text, content), encoding="utf-8")
    (root / PLOT).parent.mkdir(exist_ok=True)
    (root / PLOT).write_text(plot(found), encoding="utf-8")


def between_marks(page: str, content: str) -> str:
    begin, end = "<!-- quality -->\n", "<!-- /quality -->"
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the page lacks {begin.strip()} … {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def arguments() -> argparse.Namespace:
    from gptedge.quantize.recipes import RECIPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    recipes = ",".join(
        f"{name}{target}"
        for name, r in RECIPES.items()
        for target in ([f" --target-mb {mb}" for mb in TARGETS_MB] if r.fills_target else [""])
        if not r.distill_steps  # which takes hours
    )
    parser.add_argument("--recipes", default=recipes, help="default: all of %(default)s")
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="score this one too; may be repeated")
    parser.add_argument("--calibration", type=Path, help="text; default: the standard library's docstrings")
    parser.add_argument("--peers", default=",".join(PEERS), help="default: %(default)s; none of them: ''")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where 4 GB of models go meanwhile; default: the system's place")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--plot", type=Path, help="also write the plot here")
    parser.add_argument("--write", action="store_true", help="into both README files and docs/")
    a = parser.parse_args()
    if a.windows < 1 or (a.write and a.windows < WINDOWS):
        parser.error(f"--windows is {a.windows}; it must be at least {WINDOWS if a.write else 1}")
    a.recipes, a.peers = ([part.strip() for part in names.split(",") if part.strip()] for names in (a.recipes, a.peers))
    if unknown := sorted(set(a.peers) - set(PEERS)):
        parser.error(f"no peer is called {unknown[0]!r}; known are {', '.join(PEERS)}")
    return a


def main() -> None:
    a = arguments()
    with tempfile.TemporaryDirectory(prefix="gptedge-quality-", dir=a.work) as work:
        try:
            bench = prepare(Path(work), a.seed, a.windows, a.calibration, a.threads)
            found = list(rows(bench, a.recipes, a.peers, a.bundle))
        except (GptEdgeError, peers.PeerError) as e:
            sys.exit(str(e))
    if not found:
        sys.exit("nothing worked, so there is no table")
    print(f"{found[0].score.positions} positions, seed {a.seed}, {a.threads} threads\n")
    print(table(found, PAGES["README.md"].headings))
    if a.json:
        a.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    if a.plot:
        a.plot.write_text(plot(found), encoding="utf-8")
    if a.write:
        write(found)


if __name__ == "__main__":
    main()
