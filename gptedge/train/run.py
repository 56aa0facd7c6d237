"""A whole training run: text in, a Hugging Face checkpoint out. The function behind `gptedge train`.

What it writes, and how it is resumed, stands in `output`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptedge.checkpoint import TOKENIZER, TOKENIZER_CONFIG, write_checkpoint
from gptedge.config import ModelConfig
from gptedge.errors import UsageError
from gptedge.tokenizer import Tokenizer
from gptedge.train.config import TrainConfig
from gptedge.train.corpus import Corpus, Files, Piece, Scan
from gptedge.train.data import TokenData, require_length
from gptedge.train.model import GPT
from gptedge.train.output import (
    METRICS,
    STATE,
    alone_in,
    begin_run,
    check_output,
    precision_line,
    put_checkpoint,
    reopen_run,
    resume_trainer,
)
from gptedge.train.parts import set_up_torch
from gptedge.train.precision import DTYPES
from gptedge.train.prepare import END_OF_TEXT, end_of_text, learn_tokenizer, scan_text, tokenize
from gptedge.train.processes import Processes, processes, whole
from gptedge.train.qat import RoundedLoss, fake_quantize, refresh, refresh_is_due, rounded_weights
from gptedge.train.sample import OnModel
from gptedge.train.stdlib import stdlib_corpus
from gptedge.train.trainer import OnMessage, OnStep, StepReport, Trainer, check_patience
from gptedge.train.utilisation import flops_per_token, peak_flops
from gptedge.train.windows import RandomWindows


@dataclass(frozen=True)
class TrainResult:
    checkpoint: Path
    tokens: Path
    """The folder of what it was trained on and of what was held out (`data.TokenData`), in the user's cache."""
    steps: int
    weights_step: int
    """The step whose weights were written: the last, or under patience that of the lowest validation loss."""
    tokens_seen: int
    loss: float
    """Of the last step, in nats per token."""
    val_loss: float | None
    """None when the text is too short to hold any out."""
    seconds: float
    """Of training, all sessions of a resumed run together; reading and tokenizing are not in it."""
    tokens_per_second: float
    parameters: int
    precision: str
    mfu: float
    """Model FLOPs utilisation: of what matrix products alone reach on this machine, measured at the end."""


@dataclass(frozen=True)
class _Run:
    """What the leading process has settled before the first step; the tokenizer is in OUT/state."""

    tokens: Path
    model: ModelConfig
    resumed: bool


def run_training(
    paths: Sequence[Path] | None,
    out: Path,
    *,
    config: TrainConfig,
    resume: bool = False,
    force: bool = False,
    skip_bad: bool = False,
    shard: bool = False,
    on_step: OnStep = lambda report: None,
    on_message: OnMessage = lambda message: None,
    on_model: OnModel | None = None,
) -> TrainResult:
    """Train on the text in `paths` (None: Python's own documentation) and write a checkpoint to `out`.

    With `resume`, go on from the state in `out` to exactly what an uninterrupted run would have come to, or begin where
    there is no run yet. With
    `skip_bad`, broken lines of JSONL are left out and counted. In processes that torchrun started, each takes its rows
    of every batch, and with `shard` its part of weights and optimizer; the first one alone reports and writes.
    `on_model` is shown what is about to be trained, where one process holds all of it.
    Raises OutputExistsError, UsageError, DataError, CheckpointError, TrainingError; KeyboardInterrupt saves the state.
    """
    if config.qat and (shard or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UsageError(f"--qat {config.qat} trains in one process; leave out --shard, and start it without torchrun")
    with processes(shard=shard) as these:
        if not these.leads:
            on_step, on_message = (lambda report: None), (lambda message: None)
        set_up_torch(config)
        with ExitStack() as held:
            return _train(
                paths, Path(out), config, these, held, resume, force, skip_bad, on_step, on_message,
                None if shard else on_model,
            )  # fmt: skip


def _train(
    paths: Sequence[Path] | None,
    out: Path,
    config: TrainConfig,
    these: Processes,
    held: ExitStack,
    resume: bool,
    force: bool,
    skip_bad: bool,
    on_step: OnStep,
    on_message: OnMessage,
    on_model: OnModel | None,
) -> TrainResult:
    def settle() -> _Run:
        resumed = check_output(out, resume=resume, force=force, on_message=on_message)
        held.enter_context(alone_in(out))
        corpus: Corpus = _stdlib if paths is None else Files(paths, skip_bad=skip_bad, without=out)
        scanned = scan_text(corpus, on_message)
        tokens, model = (_reopen if resumed else _begin)(out, config, corpus, scanned, on_message)
        return _Run(tokens, model, resumed)

    run = these.from_leader(settle)
    tokenizer, data = Tokenizer.from_folder(out / STATE), TokenData.load(run.tokens)
    torch.manual_seed(config.seed)
    model = GPT(run.model, dropout=config.dropout, z_loss=config.z_loss)
    parameters = model.n_parameters()
    if config.qat:
        fake_quantize(model, config.qat)
    trained = RoundedLoss(model) if config.qat else model
    windows = _windows(config, data)
    trainer = Trainer(
        config, trained, windows, folder=out / STATE, metrics=out / METRICS, processes=these, on_message=on_message
    )
    if run.resumed:
        resume_trainer(trainer, out, on_message)
    on_message(f"model: {parameters:,} parameters; {precision_line(trainer)}; {these.describe()}")
    if on_model is not None:
        on_model(model, tokenizer)
    trainer.train(_refreshing(model, trainer, on_step) if config.qat else on_step)
    weights = whole(rounded_weights(model) if config.qat else model.state_dict())
    these.from_leader(lambda: _write(out, run.model, tokenizer, weights))
    speed = trainer.tokens_seen / trainer.elapsed_s
    return TrainResult(
        checkpoint=out,
        tokens=run.tokens,
        steps=trainer.step,
        weights_step=trainer.weights_step,
        tokens_seen=trainer.tokens_seen,
        loss=trainer.loss,
        val_loss=trainer.val_loss,
        seconds=trainer.elapsed_s,
        tokens_per_second=speed,
        parameters=parameters,
        precision=trainer.precision,
        mfu=speed
        * flops_per_token(run.model, parameters)
        / (peak_flops(DTYPES[trainer.precision], these.device) * these.world),
    )


# ---- beginning -----------------------------------------------------------------------------------------------------


_Settled = tuple[Path, ModelConfig]
"""The folder of the tokens, and the shape of the model."""


def _begin(out: Path, config: TrainConfig, corpus: Corpus, scanned: Scan, on_message: OnMessage) -> _Settled:
    """Learn a vocabulary, tokenize, and write down what the run is, all before OUT changes."""
    tokenizer = learn_tokenizer(corpus, scanned, config.recipe.vocab_size, on_message)
    settled = _settle(config, corpus, scanned, tokenizer, on_message)
    begin_run(out, config, _identity(scanned), lambda folder: tokenizer.save(folder / TOKENIZER))
    return settled


def _reopen(out: Path, config: TrainConfig, corpus: Corpus, scanned: Scan, on_message: OnMessage) -> _Settled:
    """What `_begin` came to; refuses another configuration or other text than the run began with."""
    reopen_run(out, config, _identity(scanned))
    return _settle(config, corpus, scanned, Tokenizer.from_folder(out / STATE), on_message)


def _settle(
    config: TrainConfig, corpus: Corpus, scanned: Scan, tokenizer: Tokenizer, on_message: OnMessage
) -> _Settled:
    recipe = config.recipe
    folder, data = tokenize(
        corpus, scanned, tokenizer, validation_fraction=config.validation_fraction, on_message=on_message
    )
    require_length(data.train, recipe.context_length)
    check_patience(config, _windows(config, data))
    if len(data.train) < (batch := recipe.batch_size * recipe.context_length):
        on_message(f"note: the text has fewer tokens than one step's batch, {batch:,}; it will be learned by heart")
    return folder, recipe.model(vocab_size=tokenizer.vocab_size)


def _identity(scanned: Scan) -> dict[str, str]:
    return {"text_sha256": scanned.sha256}


def _stdlib() -> Iterator[Piece]:
    return (Piece(text, True) for text in stdlib_corpus())


def _windows(config: TrainConfig, data: TokenData) -> RandomWindows:
    recipe = config.recipe
    return RandomWindows(
        data,
        batch_size=recipe.batch_size,
        context=recipe.context_length,
        eval_windows=config.eval_windows,
        seed=config.seed,
    )


def _refreshing(model: GPT, trainer: Trainer, on_step: OnStep) -> OnStep:
    """Scales follow the weights, but stay for those that are written; a state that is saved after a step has them."""

    def step(report: StepReport) -> None:
        if refresh_is_due(report.step) and not trainer.is_done:
            refresh(model)
        on_step(report)

    return step


# ---- the checkpoint ------------------------------------------------------------------------------------------------


def _tokenizer_config(context_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }


def _write(out: Path, model: ModelConfig, tokenizer: Tokenizer, weights: dict[str, torch.Tensor]) -> None:
    side_files = {
        TOKENIZER: (out / STATE / TOKENIZER).read_bytes(),
        TOKENIZER_CONFIG: json.dumps(_tokenizer_config(model.context_length), indent=2).encode() + b"\n",
    }
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text(tokenizer))
    put_checkpoint(out, lambda folder: write_checkpoint(folder, model, arrays, side_files, token_ids=ids))
