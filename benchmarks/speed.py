"""How fast gptedge and its peers run the same weights: every tool in turn, several rounds, fresh processes.

    python benchmarks/speed.py [--rounds 3] [--tools "gptedge int4,genai int4"] [--settings "chat,second turn"]
                               [--work DIR]

One model (reference_model.py) is made into what each tool runs, in --work, where it stays for the next time. Same
prompt tokens, same number of new tokens, greedy, same threads. Prints, for each setting, medians, and their ratio to
onnxruntime-genai's int4; and beside them what reading the weights and the KV cache once a token would take at the
memory bandwidth measured here.

A runner reads {"model", "prompt", "new", "second", "threads", "options", "ends"} as JSON, and prints a list: seconds of
loading, to the first token, and of the others; the tokens; the time of day of the first; seconds to the first token of
a second turn; peak resident memory in MB. A reply ends with any of the tokens "ends" (genai's with the model's own).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers
import quality
import reference_model

from gptedge.bundle import open_bundle
from gptedge.evaluate.bench import memory_bandwidth

RUNNERS = Path(__file__).parent / "runners"
BASIS = "genai int4"
NOTICE = """The harbour town of Ellport wakes before the sun. Fishermen in yellow coats carry crates of ice down the
stone steps, and the first ferry sounds its horn at half past five. By six the bakery on Mill Street has
sold most of its rye loaves, and children on bicycles race each other to the school bus. In the afternoon
the market closes, gulls gather on the empty stalls, and the old lighthouse keeper, Martin Hale, winds
the clock in the tower as he has done every day for forty-one years. On Sundays the brass band plays by
the fountain until the lamps along the pier are lit."""
LETTER = """Dear Mrs Whitfield, thank you for the parcel that arrived on Tuesday morning. The blue vase was well packed
and did not break on the way. My daughter has put it on the shelf beside the window, where it catches the light
in the afternoon. We would like to order two more of the same size, one in green and one in white, if you still
have them. Please send the bill to the address below, and tell us which day the driver will come, because we are
away from the fourteenth to the twentieth of next month. With kind regards from all of us, Thomas Reed."""
STORY = """Anna lived in a small house at the edge of the forest. Every morning she fed the hens, opened the shutters
and put the kettle on the stove. Her brother Peter walked to the mill with a sack of grain on his shoulder, and
Anna waved to him from the door until he was out of sight. In winter, when the snow lay deep, she read old books
by the fire, and the cat slept on her knees. One evening there was a knock at the door, and Anna took the lamp
from the table to see who it was. A tall stranger stood in the snow with a letter in his hand."""
TEXTS = {"notice": NOTICE, "letter": LETTER, "story": STORY}
REWRITING = "Repeat the following text exactly, word for word, and change nothing:\n\n"


@dataclass(frozen=True)
class Tool:
    runner: str
    python: Callable[[], Path | str]
    make: Callable[[Path], Path]
    """From the work folder to what it runs, which is made when it is not there."""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    prompt_tokens: int
    new_tokens: int
    second: int = 0
    """Tokens of a second question."""
    request: str = ""
    """What is asked in chat form, in the place of so many tokens of a prompt."""
    copied: str = ""
    """A text that the prompt holds twice and begins a third time, so that going on is copying."""


SETTINGS = {
    "chat": Setting(64, 128),
    "prompt of 512": Setting(512, 128),
    "prompt of 2048": Setting(2048, 128),
    **{f"rewriting a {name}": Setting(0, 128, request=REWRITING + text) for name, text in TEXTS.items()},
    **{f"copying a {name}": Setting(0, 96, copied=text) for name, text in TEXTS.items()},
    "second turn": Setting(512, 32, second=32),
}


def bundle(recipe: str) -> Callable[[Path], Path]:
    def make(work: Path) -> Path:
        fp32, out, text = work / "fp32", work / recipe, work / "calibration.txt"
        if not fp32.exists():
            quality.gptedge("export", checkpoint(work), fp32, "--no-verify")
        if not out.exists():
            text.write_text(quality.calibration_text(), encoding="utf-8")
            quality.gptedge("quantize", fp32, out, "--recipe", recipe, "--prefill", "int8", "--calibration", text)
        return out

    return make


def fp32(work: Path) -> Path:
    if not (work / "fp32").exists():
        quality.gptedge("export", checkpoint(work), work / "fp32", "--no-verify")
    return work / "fp32"


def checkpoint(work: Path) -> Path:
    if not (work / "checkpoint").exists():
        reference_model.make(work / "checkpoint", seed=0, gguf_file=work / "reference.gguf")
    return work / "checkpoint"


def genai_int4(work: Path) -> Path:
    out = work / "genai-int4"
    if not out.exists():
        python = peers.environment("genai-builder")
        builder = [python, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint(work), "-o", out]
        quality.run([*builder, "-c", work / "cache", "-p", "int4", "-e", "cpu"])
    return out


def gguf(name: str) -> Callable[[Path], Path]:
    def make(work: Path) -> Path:
        out = work / f"{name}.gguf"
        if not out.exists():
            checkpoint(work)
            program = RUNNERS / "llama_cpp_quantize.py"
            kind = quality.LLAMA_CPP[f"llama.cpp {name}"]
            peers.run_json("llama-cpp", program, [str(work / "reference.gguf"), str(out), kind])
        return out

    return make


def ours() -> str:
    return sys.executable


def peer(name: str) -> Callable[[], Path]:
    return lambda: peers.environment(name)


NGRAM = {"ngram_size": 3, "max_draft_tokens": 4}
TOOLS = {
    "gptedge int4": Tool("gptedge_runner.py", ours, bundle("int4")),
    "gptedge int8": Tool("gptedge_runner.py", ours, bundle("int8")),
    "genai int4": Tool("genai_runner.py", peer("genai"), genai_int4),
    "genai int4 n-gram": Tool("genai_runner.py", peer("genai"), genai_int4, NGRAM),
    "llama.cpp Q4_0": Tool("llama_cpp_runner.py", peer("llama-cpp"), gguf("Q4_0")),
    "llama.cpp Q4_K_M": Tool("llama_cpp_runner.py", peer("llama-cpp"), gguf("Q4_K_M")),
    "optimum fp32": Tool("transformers_runner.py", peer("optimum"), fp32, {"optimum": True}),
    "transformers fp32": Tool("transformers_runner.py", ours, checkpoint),
}


@dataclass(frozen=True)
class Run:
    load_s: float
    first_s: float
    rest_s: float
    tokens: list[int]
    cold_s: float
    """From starting the process to its first token."""
    second_s: float | None
    peak_mb: float


def one_run(tool: Tool, work: dict[str, Any]) -> Run:
    """Raises PeerError with the program's last lines when it fails."""
    command = [tool.python(), RUNNERS / tool.runner]
    environment = os.environ | peers.OFFLINE
    begin = time.time()
    done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise peers.PeerError(f"{tool.runner} failed with {done.returncode}:\n{done.stderr[-1500:]}")
    load_s, first_s, rest_s, tokens, first_at, second_s, peak_mb = json.loads(done.stdout.splitlines()[-1])
    return Run(load_s, first_s, rest_s, tokens, first_at - begin, second_s, peak_mb)


def prompt_of(folder: Path, setting: Setting) -> list[int]:
    """Token ids of ordinary English, the beginning of Python's own documentation; or of what the setting has."""
    from pydoc_data.topics import topics

    from gptedge.chat_prompt import ChatPrompt
    from gptedge.chat_template import load_chat_template
    from gptedge.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    if setting.copied:
        text, gap = tokenizer.encode(setting.copied), tokenizer.encode("\n\n")
        return [*text, *gap, *text, *gap, *text[:8]]
    if not setting.request:
        return tokenizer.encode(" ".join(topics.values())[: 8 * setting.prompt_tokens])[: setting.prompt_tokens]
    chat = ChatPrompt(load_chat_template(folder), tokenizer)
    return chat.encode(chat.render([{"role": "user", "content": setting.request}]))


def measure(names: list[str], setting: Setting, work: Path, rounds: int, threads: int) -> dict[str, list[Run]]:
    """Runs of each tool, in turn; those of the first round, which warm the disk's cache, are dropped."""
    prompt = prompt_of(checkpoint(work), setting)
    second = prompt[5 : 5 + setting.second]
    ends = sorted(open_bundle(fp32(work)).eos_ids) if setting.request else []
    found: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name in list(found):
            tool = TOOLS[name]
            job = {"prompt": prompt, "new": setting.new_tokens, "second": second, "threads": threads, "ends": ends}
            try:
                job |= {"model": str(tool.make(work)), "options": dict(tool.options)}
                found[name].append(one_run(tool, job))
            except peers.PeerError as e:
                print(f"{name} is left out: {e}", file=sys.stderr)
                del found[name]
    return {name: runs[1:] for name, runs in found.items()}


def share_copied(tokens: list[int], prompt: list[int]) -> float:
    """Of the tokens of a reply, those that end four that the prompt has in this order."""
    fours = set(zip(*(prompt[i:] for i in range(4)), strict=False))
    text = [*prompt[-3:], *tokens]
    return sum(four in fours for four in zip(*(text[i:] for i in range(4)), strict=False)) / len(tokens)


COLUMNS: dict[str, Callable[[Run, list[int]], float | None]] = {
    "load s": lambda run, prompt: run.load_s,
    "first token s": lambda run, prompt: run.first_s,
    "prefill tok/s": lambda run, prompt: len(prompt) / run.first_s,
    "decode tok/s": lambda run, prompt: (len(run.tokens) - 1) / run.rest_s,
    "copied": lambda run, prompt: share_copied(run.tokens, prompt),
    "second turn s": lambda run, prompt: run.second_s,
    "cold start s": lambda run, prompt: run.cold_s,
    "peak MB": lambda run, prompt: run.peak_mb,
}


def table(found: Mapping[str, list[Run]], prompt: list[int]) -> str:
    """Markdown: medians, and in brackets the ratio to BASIS."""

    def median(name: str, column: str) -> float | None:
        values = [COLUMNS[column](run, prompt) for run in found.get(name, [])]
        known = [v for v in values if v is not None]
        return statistics.median(known) if known else None

    columns = [c for c in COLUMNS if any(median(name, c) is not None for name in found)]
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name in found:
        cells = []
        for column in columns:
            value, basis = median(name, column), median(BASIS, column)
            ratio = f" ({value / basis:.2f}×)" if value is not None and basis else ""
            cells.append("" if value is None else f"{value:.3g}{ratio}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS), help="default: %(default)s")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/speed"), help="models stay here; default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write every run here")
    a = parser.parse_args()
    tools, settings = ([part.strip() for part in names.split(",")] for names in (a.tools, a.settings))
    if unknown := sorted({*tools, *settings} - {*TOOLS, *SETTINGS}):
        parser.error(f"{unknown[0]!r} is not known; tools: {', '.join(TOOLS)}; settings: {', '.join(SETTINGS)}")
    a.work.mkdir(parents=True, exist_ok=True)
    print(f"memory bandwidth {memory_bandwidth(a.threads) / 1e9:.1f} GB/s with {a.threads} threads")
    everything: dict[str, Any] = {}
    for name in settings:
        setting = SETTINGS[name]
        found = measure(tools, setting, a.work, a.rounds, a.threads)
        prompt = prompt_of(checkpoint(a.work), setting)
        head = f"{name}: {len(prompt)} tokens, {setting.new_tokens} new, medians of {a.rounds}"
        print(f"\n{head}\n\n{table(found, prompt)}", flush=True)
        everything[name] = {tool: [vars(run) for run in runs] for tool, runs in found.items()}
    if a.json:
        a.json.write_text(json.dumps(everything) + "\n")


if __name__ == "__main__":
    main()
