"""A whole training run: text in, a Hugging Face checkpoint out. The function behind `gptedge train`.

What it writes, and how it is resumed, stands in `output`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptedge.checkpoint import TOKENIZER, TOKENIZER_CONFIG, write_checkpoint
from gptedge.config import ModelConfig
from gptedge.tokenizer import Tokenizer, train_bpe
from gptedge.train.config import TrainConfig
from gptedge.train.data import TokenData, fingerprint, read_documents, require_length, tokenize, vocabulary_sample
from gptedge.train.model import GPT
from gptedge.train.output import (
    METRICS,
    STATE,
    OnMessage,
    begin_run,
    check_output,
    check_same_run,
    precision_line,
    put_checkpoint,
    resume_trainer,
)
from gptedge.train.stdlib import stdlib_corpus
from gptedge.train.trainer import OnStep, Trainer
from gptedge.train.windows import RandomWindows

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TrainResult:
    checkpoint: Path
    steps: int
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


@dataclass(frozen=True)
class _Run:
    """What a run has settled before its first step, and a resumed one finds in OUT/state."""

    tokenizer: Tokenizer
    data: TokenData
    model: ModelConfig


def run_training(
    paths: Sequence[Path] | None,
    out: Path,
    *,
    config: TrainConfig,
    resume: bool = False,
    force: bool = False,
    on_step: OnStep = lambda report: None,
    on_message: OnMessage = lambda message: None,
) -> TrainResult:
    """Train on the text in `paths` (None: Python's own documentation) and write a checkpoint to `out`.

    With `resume`, go on from the state in `out` to exactly what an uninterrupted run would have come to.
    Raises OutputExistsError, UsageError, DataError, CheckpointError, TrainingError; KeyboardInterrupt saves the state.
    """
    out = Path(out)
    check_output(out, resume=resume, force=force)
    if config.threads:
        torch.set_num_threads(config.threads)
    documents = list(stdlib_corpus()) if paths is None else read_documents(paths)
    run = _reopen(out, config, documents) if resume else _begin(out, config, documents, on_message)
    torch.manual_seed(config.seed)
    model = GPT(run.model)
    trainer = _make_trainer(out, run, config, model)
    if resume:
        resume_trainer(trainer, out, on_message)
    threads = torch.get_num_threads()
    on_message(f"model: {model.n_parameters():,} parameters; {precision_line(trainer)}; {threads} threads")
    trainer.train(on_step)
    _write(out, model, run.tokenizer)
    return TrainResult(
        checkpoint=out,
        steps=trainer.step,
        tokens_seen=trainer.tokens_seen,
        loss=trainer.loss,
        val_loss=trainer.val_loss,
        seconds=trainer.elapsed_s,
        tokens_per_second=trainer.tokens_seen / trainer.elapsed_s,
        parameters=model.n_parameters(),
        precision=trainer.precision,
    )


# ---- beginning -----------------------------------------------------------------------------------------------------


def _begin(out: Path, config: TrainConfig, documents: Sequence[str], on_message: OnMessage) -> _Run:
    """Learn a vocabulary, tokenize, and write down what the run is, all before OUT changes."""
    characters = sum(map(len, documents))
    on_message(f"text: {len(documents):,} documents, {characters:,} characters")
    began = time.perf_counter()
    recipe = config.recipe
    tokenizer = train_bpe(vocabulary_sample(documents), recipe.vocab_size, special_tokens=[END_OF_TEXT])
    learned = time.perf_counter()
    on_message(f"tokenizer: {tokenizer.vocab_size:,} tokens, learned in {learned - began:.1f} s")
    data = tokenize(documents, tokenizer, end=_end_id(tokenizer), validation_fraction=config.validation_fraction)
    on_message(
        f"tokens: {len(data.train):,} to train on, {len(data.validation):,} held out; "
        f"tokenized in {time.perf_counter() - learned:.1f} s"
    )
    require_length(data.train, recipe.context_length)

    def save(folder: Path) -> None:
        tokenizer.save(folder / TOKENIZER)
        data.save(folder)

    begin_run(out, config, _identity(documents), save)
    return _Run(tokenizer, data, recipe.model(vocab_size=tokenizer.vocab_size))


def _reopen(out: Path, config: TrainConfig, documents: Sequence[str]) -> _Run:
    """What `_begin` wrote; refuses another configuration or other text than the run began with."""
    check_same_run(out, config, _identity(documents))
    tokenizer = Tokenizer.from_folder(out / STATE)
    return _Run(tokenizer, TokenData.load(out / STATE), config.recipe.model(vocab_size=tokenizer.vocab_size))


def _identity(documents: Sequence[str]) -> dict[str, str]:
    return {"text_sha256": fingerprint(documents)}


def _make_trainer(out: Path, run: _Run, config: TrainConfig, model: GPT) -> Trainer:
    recipe = config.recipe
    windows = RandomWindows(
        run.data,
        batch_size=recipe.batch_size,
        context=recipe.context_length,
        eval_windows=config.eval_windows,
        seed=config.seed,
    )
    return Trainer(config, model, windows, folder=out / STATE, metrics=out / METRICS)


# ---- the checkpoint ------------------------------------------------------------------------------------------------


def _end_id(tokenizer: Tokenizer) -> int:
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None, "train_bpe was asked for it"
    return end


def _tokenizer_config(context_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }


def _write(out: Path, model: GPT, tokenizer: Tokenizer) -> None:
    side_files = {
        TOKENIZER: (out / STATE / TOKENIZER).read_bytes(),
        TOKENIZER_CONFIG: json.dumps(_tokenizer_config(model.config.context_length), indent=2).encode() + b"\n",
    }
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _end_id(tokenizer))
    put_checkpoint(out, lambda folder: write_checkpoint(folder, model.config, weights, side_files, token_ids=ids))
