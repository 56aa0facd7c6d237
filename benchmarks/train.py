"""gptedge, nanoGPT's stock loop and Hugging Face's Trainer on the same tokens, sizes and threads, in turn.

    python benchmarks/train.py [--nanogpt CHECKOUT] [--text FILE] [--rounds 2] [--steps 12] [--threads 2]

Prints each one's tokens a second (the median over all steps but the first ones), the ratios, and the loss after as many
tokens. nanoGPT is run from a checkout of https://github.com/karpathy/nanoGPT as it stands; without one it is
left out. Its model has learned positions and an ungated feed-forward, ours and the Trainer's are Llamas of its size.
The Trainer is given our tokens, our schedule and our AdamW; each gets bfloat16 where gptedge chooses it here.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SHAPE = {"n_layer": 6, "n_head": 6, "n_kv_head": 6, "n_embd": 384, "n_ff": 1024, "context_length": 256, "batch_size": 4}
PEAK, SKIPPED = 1e-3, 2  # the first steps of a process also load and allocate

HF = """
import json, sys, time
import numpy as np, torch, transformers
train, vocab, steps, threads, precision, s, peak, out = json.loads(sys.argv[1])
torch.set_num_threads(threads)
transformers.set_seed(0)
tokens = np.memmap(train, np.uint16, mode="r")
T = s["context_length"]

class Windows(torch.utils.data.Dataset):
    def __len__(self):
        return steps * s["batch_size"]
    def __getitem__(self, i):
        start = np.random.default_rng((0, i)).integers(len(tokens) - T - 1)
        ids = torch.from_numpy(tokens[start : start + T].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

class Clock(transformers.TrainerCallback):
    times, losses = [], []
    def on_step_begin(self, *a, **k):
        self.began = time.perf_counter()
    def on_step_end(self, *a, **k):
        self.times.append(time.perf_counter() - self.began)
    def on_log(self, args, state, control, logs=None, **k):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

config = transformers.LlamaConfig(
    vocab_size=vocab, hidden_size=s["n_embd"], intermediate_size=s["n_ff"], num_hidden_layers=s["n_layer"],
    num_attention_heads=s["n_head"], num_key_value_heads=s["n_kv_head"], max_position_embeddings=T,
    tie_word_embeddings=True,
)
model = transformers.LlamaForCausalLM(config)
arguments = transformers.TrainingArguments(
    output_dir=out, max_steps=steps, per_device_train_batch_size=s["batch_size"], learning_rate=peak,
    lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), weight_decay=0.1, adam_beta2=0.99, max_grad_norm=1.0,
    logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=precision == "bf16", disable_tqdm=True,
    optim="adamw_torch_fused",
)
clock = Clock()
transformers.Trainer(model=model, args=arguments, train_dataset=Windows(), callbacks=[clock]).train()
print(json.dumps([clock.times, clock.losses]))
"""


@dataclass
class Run:
    """One program's steps of one round."""

    seconds: list[float]
    losses: list[float]


@dataclass(frozen=True)
class Work:
    folder: Path
    tokens: Path
    vocab_size: int
    precision: str
    steps: int
    threads: int
    nanogpt: Path | None


def prepare(folder: Path, text: Path | None, arguments: argparse.Namespace) -> Work:
    """Tokens for all of them, learned from `text` or from Python's own documentation."""
    from gptedge.tokenizer import Tokenizer
    from gptedge.train.stdlib import stdlib_corpus

    if text is None:
        text = folder / "stdlib.txt"
        text.write_text("\n".join(stdlib_corpus()), encoding="utf-8")
    (folder / "text").symlink_to(text.resolve())
    value = gptedge(folder, "first", steps=1, threads=arguments.threads)
    vocab_size = Tokenizer.from_folder(folder / "first").vocab_size
    tokens, precision = Path(str(value["tokens"])), str(value["precision"])
    if arguments.nanogpt:
        _stage_nanogpt(folder / "nanogpt", arguments.nanogpt, tokens, vocab_size)
    return Work(folder, tokens, vocab_size, precision, arguments.steps, arguments.threads, arguments.nanogpt)


def gptedge(folder: Path, name: str, *, steps: int, threads: int) -> dict[str, object]:
    """A run of the command, as a user starts it; what it prints."""
    config = folder / f"{name}.toml"
    settings = SHAPE | {"vocab_size": 4096, "learning_rate": PEAK, "eval_every": 10**6, "save_every": 0}
    config.write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
    options = ["--data", folder / "text", "--out", folder / name, "--config", config, "--max-steps", steps]
    done = _run([sys.executable, "-m", "gptedge", "train", *options, "--threads", threads, "--json", "--force"], folder)
    value: dict[str, object] = json.loads(done)
    return value


def run_gptedge(work: Work) -> Run:
    gptedge(work.folder, "ours", steps=work.steps, threads=work.threads)
    lines = [json.loads(line) for line in (work.folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    per_step = SHAPE["batch_size"] * SHAPE["context_length"]
    return Run([per_step / line["tokens_per_second"] for line in lines], [line["loss"] for line in lines])


def run_trainer(work: Work) -> Run:
    train, out = str(work.tokens / "train.bin"), str(work.folder / "hf")
    given = [train, work.vocab_size, work.steps, work.threads, work.precision, SHAPE, PEAK, out]
    return Run(*json.loads(_run([sys.executable, "-c", HF, json.dumps(given)], work.folder).splitlines()[-1]))


def run_nanogpt(work: Work) -> Run:
    settings = {
        "dataset": "bench",
        "device": "cpu",
        "compile": False,
        "dtype": "float32",
        "eval_iters": 1,
        "eval_interval": 10**6,
        "max_iters": work.steps,
        "lr_decay_iters": work.steps,
        "warmup_iters": max(1, work.steps // 20),
        "learning_rate": PEAK,
        "min_lr": PEAK / 20,
        "beta2": 0.99,
        "gradient_accumulation_steps": 1,
        "batch_size": SHAPE["batch_size"],
        "block_size": SHAPE["context_length"],
    } | {key: SHAPE[key] for key in ("n_layer", "n_head", "n_embd")}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    environment = {"OMP_NUM_THREADS": str(work.threads)}
    out = _run([sys.executable, "train.py", *flags], work.folder / "nanogpt", environment)
    found = re.findall(r"iter \d+: loss ([\d.]+), time ([\d.]+)ms", out)
    return Run([float(ms) / 1e3 for _loss, ms in found][1:], [float(loss) for loss, _ms in found][: work.steps])


def _stage_nanogpt(folder: Path, checkout: Path, tokens: Path, vocab_size: int) -> None:
    data = folder / "data" / "bench"
    data.mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py"):
        (folder / name).symlink_to((checkout / name).resolve(strict=True))
    (data / "train.bin").symlink_to(tokens / "train.bin")
    (data / "val.bin").symlink_to(tokens / "train.bin")  # asked for once, before the first step
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))


def _run(command: list[object], folder: Path, environment: dict[str, str] | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=os.environ | (environment or {}))
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:4])}… failed:\n{done.stderr[-2000:]}")
    return done.stdout


PROGRAMS: dict[str, Callable[[Work], Run]] = {
    "gptedge": run_gptedge,
    "nanoGPT": run_nanogpt,
    "HF Trainer": run_trainer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, help="what to train on (default: Python's documentation)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = prepare(Path(temporary), arguments.text, arguments)
        names = [name for name in PROGRAMS if name != "nanoGPT" or work.nanogpt]
        runs = {name: list[Run]() for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                run = PROGRAMS[name](work)
                print(f"{name}: {statistics.median(run.seconds[SKIPPED:]):.3f} s a step", file=sys.stderr, flush=True)
                runs[name].append(run)
    if work.nanogpt is None:
        print("nanoGPT is left out: git clone https://github.com/karpathy/nanoGPT, and give its folder to --nanogpt")
    print(f"{work.precision} where it is ours to choose; nanoGPT float32; {work.threads} threads; {SHAPE}")
    for line in table(runs):
        print(line)


def table(runs: dict[str, list[Run]]) -> list[str]:
    per_step = SHAPE["batch_size"] * SHAPE["context_length"]
    speed = {
        name: per_step / statistics.median(t for r in rs for t in r.seconds[SKIPPED:]) for name, rs in runs.items()
    }
    lines = []
    for name, rs in runs.items():
        last = statistics.mean(loss for r in rs for loss in r.losses[-max(1, len(r.losses) // 5) :])
        tokens = per_step * len(rs[0].losses)
        ratio = speed["gptedge"] / speed[name]
        lines.append(
            f"{name:11} {speed[name]:7,.0f} tokens/s   ours is {ratio:.2f}x   loss {last:.3f} after {tokens:,} tokens"
        )
    return lines


if __name__ == "__main__":
    main()
