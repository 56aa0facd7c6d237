"""The whole line in a few minutes: train, export, quantize, evaluate; then the same for a real chat model.

The text to train on is what every Python brings along. Only the chat model is fetched; without a network that half is
skipped, in one line, and the rest counts.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from gptedge.errors import DownloadError, OutputExistsError
from gptedge.files import write_json
from gptedge.progress import Report

MODEL = "smollm2-135m-instruct"
QUESTION = "What is gravity? Answer in two sentences."
TRAIN_SECONDS = 120.0
QUANTIZED = {"int8": "int8", "int4": "int4-rtn"}
"""A bundle's ending -> its recipe."""
_MARK = "demo.json"
_EVAL_WINDOWS = {"nano": 16, "smollm2": 6}
_REPLY_TOKENS = 96


class Screen(Protocol):
    """Where the demo shows what it does."""

    def title(self, text: str) -> None: ...
    def line(self, text: str) -> None: ...
    def piece(self, text: str) -> None:
        """A piece of a reply as it comes; no newline."""

    def progress(self, title: str) -> AbstractContextManager[Report]: ...
    def training(self) -> AbstractContextManager[Callable[[Any], None]]: ...


@dataclass(frozen=True)
class Row:
    bundle: str
    size_mb: float
    ppl_increase: float
    kl: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class DemoResult:
    rows: list[Row]
    skipped: str | None
    """Why the chat model is missing, if it is."""
    chat_command: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run(out: Path, screen: Screen, *, train_seconds: float = TRAIN_SECONDS, seed: int = 0) -> DemoResult:
    """Run everything into the folder `out`. An earlier demo there is replaced; another folder is refused."""
    _claim(out)
    rows = _own_model(out, screen, train_seconds, seed)
    skipped = None
    chat_with = out / "nano-int8"
    try:
        rows += _chat_model(out, screen)
        chat_with = out / "smollm2-int8"
    except DownloadError as e:
        skipped = str(e)
        screen.line(f"skipped: {skipped}")
    return DemoResult(rows, skipped, f"gptedge chat {shlex.quote(str(chat_with))}")


def _claim(out: Path) -> None:
    if out.exists() and not (out / _MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"{out} exists already and no demo made it; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _MARK, {"made_by": "gptedge demo"})


def _own_model(out: Path, screen: Screen, train_seconds: float, seed: int) -> list[Row]:
    """Train on Python's documentation, and check the export against PyTorch."""
    from gptedge.train.config import TrainConfig
    from gptedge.train.data import TokenData
    from gptedge.train.run import run_training

    screen.title("Train a small GPT on the documentation that Python ships")
    config = TrainConfig(preset="nano", max_seconds=train_seconds, seed=seed)
    checkpoint = out / "nano"
    with screen.training() as on_step:
        trained = run_training(None, checkpoint, config=config, force=True, on_step=on_step, on_message=screen.line)
    screen.line(f"{trained.parameters:,} parameters, {trained.steps} steps, held-out loss {trained.val_loss:.3f}")
    bundles = _bundles(out, "nano", checkpoint, screen)
    _check_against_pytorch(checkpoint, bundles[0], screen)
    held_out = TokenData.load(trained.tokens).validation
    return _judge("nano", bundles, [int(i) for i in held_out], screen)


def _chat_model(out: Path, screen: Screen) -> list[Row]:
    from gptedge.evaluate.sample import sample_text
    from gptedge.loading import load
    from gptedge.pull import pull

    screen.title("A real chat model: SmolLM2-135M-Instruct")
    with screen.progress("pull") as report:
        pulled = pull(MODEL, progress=lambda file, done, total: report(done, total or 0, file))
    screen.line(f"{pulled.path} ({pulled.bytes / 1e6:.1f} MB)")
    bundles = _bundles(out, "smollm2", pulled.path, screen)
    for bundle in reversed(bundles[1:]):
        with load(bundle) as model:
            screen.line(f"{bundle.name}> {QUESTION}")
            with model.chat().stream(QUESTION, max_tokens=_REPLY_TOKENS) as stream:
                for chunk in stream:
                    screen.piece(chunk.text)
            screen.piece("\n")
    with load(bundles[0]) as model:
        ids = model.tokenizer.encode(sample_text())
    return _judge("smollm2", bundles, ids, screen)


def _bundles(out: Path, name: str, source: Path, screen: Screen) -> list[Path]:
    """The fp32 bundle of `source`, then the quantized ones."""
    from gptedge.export.exporter import export
    from gptedge.quantize.quantizer import quantize

    screen.title(f"Export and quantize {name}")
    first = out / f"{name}-fp32"
    with screen.progress("export") as report:
        exported = export(source, first, force=True, report=report)
    parity = exported.parity
    assert parity is not None
    screen.line(
        f"{first}: {exported.size_mb:g} MB in {exported.seconds:g} s; "
        f"{parity.greedy_tokens_equal} of {parity.greedy_tokens_compared} greedy tokens as in the source"
    )
    made = [first]
    for ending, recipe in QUANTIZED.items():
        target = out / f"{name}-{ending}"
        with screen.progress(f"quantize {ending}") as report:
            smaller = quantize(first, target, recipe=recipe, force=True, report=report)
        screen.line(f"{target}: {smaller.size_mb:g} MB in {smaller.seconds:g} s")
        made.append(target)
    return made


def _check_against_pytorch(checkpoint: Path, bundle: Path, screen: Screen) -> None:
    """PyTorch's model and the ONNX bundle, token for token."""
    import torch

    from gptedge.bundle import open_bundle
    from gptedge.checkpoint import open_checkpoint
    from gptedge.export.parity import check, compare
    from gptedge.runtime.session import Session
    from gptedge.train.model import GPT

    model = GPT.from_checkpoint(open_checkpoint(checkpoint)).eval()

    def logits(ids: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids]))[0].numpy()

    parity = compare(Session(open_bundle(bundle)), logits, seed=1)
    check(parity, "fp32")
    screen.line(
        f"PyTorch against ONNX: {parity.greedy_tokens_equal} of {parity.greedy_tokens_compared} greedy tokens equal, "
        f"largest logit difference {parity.max_abs_logit_diff:.1e}"
    )


def _judge(name: str, bundles: Sequence[Path], ids: Sequence[int], screen: Screen) -> list[Row]:
    """Quality against the first bundle, and speed, of each."""
    from gptedge.evaluate.bench import decode_speed
    from gptedge.evaluate.divergence import evaluate
    from gptedge.loading import load

    rows = []
    screen.title(f"Evaluate {name}")
    with load(bundles[0]) as reference:
        for bundle in bundles:
            with load(bundle) as model, screen.progress(bundle.name) as report:
                speed = decode_speed(model.session)
                if bundle == bundles[0]:
                    rows.append(Row(bundle.name, _size(model), 0.0, 0.0, speed))
                    continue
                result = evaluate(
                    model.session, ids, reference=reference.session, max_windows=_EVAL_WINDOWS[name], report=report
                )
                assert result.ppl_increase is not None
                assert result.kl_divergence is not None
                rows.append(Row(bundle.name, _size(model), result.ppl_increase, result.kl_divergence["mean"], speed))
    return rows


def _size(model: Any) -> float:
    return float(round(model.bundle.size_bytes / 1e6, 2))
