"""A whole training run: text in, a Hugging Face checkpoint out. The function behind `gptedge train`.

    OUT/config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json    the checkpoint
    OUT/metrics.jsonl    a line for each step
    OUT/state/           what --resume continues from

The checkpoint appears when the training is done; until then, OUT has only metrics and state. With `force`, an older
checkpoint in OUT stays until the new one takes its place, and files that are not a checkpoint's are left alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptedge.checkpoint import (
    CONFIG,
    SIDE_FILES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    read_json_object,
    write_checkpoint,
)
from gptedge.config import ModelConfig
from gptedge.errors import CheckpointError, OutputExistsError, UsageError
from gptedge.files import new_folder, write_json
from gptedge.tokenizer import Tokenizer, train_bpe
from gptedge.train.config import RESUMABLE_CHANGES, TrainConfig
from gptedge.train.data import TokenData, fingerprint, read_documents, require_length, tokenize, vocabulary_sample
from gptedge.train.model import GPT
from gptedge.train.state import discard_after, load_state
from gptedge.train.stdlib import stdlib_corpus
from gptedge.train.trainer import OnStep, Trainer

END_OF_TEXT = "<|endoftext|>"
STATE, METRICS, RUN = "state", "metrics.jsonl", "run.json"

OnMessage = Callable[[str], None]


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
    _check_out(out, resume=resume, force=force)
    if config.threads:
        torch.set_num_threads(config.threads)
    documents = list(stdlib_corpus()) if paths is None else read_documents(paths)
    run = _reopen(out / STATE, config, documents) if resume else _begin(out, config, documents, on_message)
    trainer = _make_trainer(out, run, config, resume=resume, on_message=on_message)
    trainer.train(on_step)
    _write(out, trainer.model, run.tokenizer)
    return TrainResult(
        checkpoint=out,
        steps=trainer.step,
        tokens_seen=trainer.tokens_seen,
        loss=trainer.loss,
        val_loss=trainer.val_loss,
        seconds=trainer.elapsed_s,
        tokens_per_second=trainer.tokens_seen / trainer.elapsed_s,
        parameters=trainer.model.n_parameters(),
        precision=trainer.precision,
    )


# ---- beginning -----------------------------------------------------------------------------------------------------


def _check_out(out: Path, *, resume: bool, force: bool) -> None:
    if resume and not (out / STATE / RUN).is_file():
        raise CheckpointError(f"cannot resume: {out / STATE} holds no run; start one without --resume")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, and the output is a folder; choose another output")
    if out.exists() and not (resume or force):
        hint = "go on with it by --resume, " if (out / STATE / RUN).is_file() else ""
        raise OutputExistsError(f"{out} exists already; {hint}choose another output or add --force")


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
    run = _Run(tokenizer, data, recipe.model(vocab_size=tokenizer.vocab_size))
    (out / METRICS).unlink(missing_ok=True)
    with new_folder(out / STATE, force=True) as folder:
        tokenizer.save(folder / TOKENIZER)
        data.save(folder)
        write_json(folder / RUN, {"config": config.to_dict(), "data_sha256": fingerprint(documents)})
    return run


def saved_config(out: Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """The configuration of the run in `out`, with what is not None in `overrides`: what to resume it with."""
    path = Path(out) / STATE / RUN
    settings = read_json_object(path).get("config")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} has no config; start the run again without --resume")
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    return TrainConfig.from_dict(settings | given, where=str(path))


def _reopen(folder: Path, config: TrainConfig, documents: Sequence[str]) -> _Run:
    """What `_begin` wrote; refuses another configuration or other text than the run began with."""
    before = saved_config(folder.parent)
    for name, value in config.to_dict().items():
        old = getattr(before, name)
        if value != old and name not in RESUMABLE_CHANGES:
            raise UsageError(f"cannot resume with {name} {value!r}: the run began with {old!r}; leave it as it was")
    if read_json_object(folder / RUN).get("data_sha256") != fingerprint(documents):
        raise CheckpointError(f"cannot resume: the text is not what the run in {folder.parent} began with")
    tokenizer = Tokenizer.from_folder(folder)
    return _Run(tokenizer, TokenData.load(folder), config.recipe.model(vocab_size=tokenizer.vocab_size))


def _make_trainer(out: Path, run: _Run, config: TrainConfig, *, resume: bool, on_message: OnMessage) -> Trainer:
    torch.manual_seed(config.seed)
    trainer = Trainer(config, GPT(run.model), run.data, folder=out / STATE, metrics=out / METRICS)
    if resume:
        trainer.restore(load_state(out / STATE, on_message))
        discard_after(out / STATE, trainer.step)
        on_message(f"resuming after step {trainer.step:,}")
    how = "bfloat16 matrix products" if trainer.precision == "bf16" else "float32"
    why = "as asked" if config.precision != "auto" else "the faster on this processor"
    parameters = trainer.model.n_parameters()
    on_message(f"model: {parameters:,} parameters; {how}, {why}; {torch.get_num_threads()} threads")
    return trainer


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
    """Write the checkpoint aside, then put it in the place of what OUT may hold of another."""
    side_files = {
        TOKENIZER: (out / STATE / TOKENIZER).read_bytes(),
        TOKENIZER_CONFIG: json.dumps(_tokenizer_config(model.config.context_length), indent=2).encode() + b"\n",
    }
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _end_id(tokenizer))
    aside = out / ".checkpoint"
    with new_folder(aside, force=True) as folder:
        write_checkpoint(folder, model.config, weights, side_files, token_ids=ids)
    # No config.json, no checkpoint: it goes first and comes last, so that none is ever half old and half new.
    for name in (CONFIG, WEIGHTS, WEIGHTS_INDEX, *SIDE_FILES):
        (out / name).unlink(missing_ok=True)
    for file in sorted(aside.iterdir(), key=lambda file: file.name == CONFIG):
        file.rename(out / file.name)
    aside.rmdir()
