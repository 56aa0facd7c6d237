"""Fine-tuning: a model and conversations in, the model that learned them out. The function behind `gptedge finetune`.

OUT/config.json  model.safetensors  tokenizer.json …                the model, of its own family, updates merged in
OUT/adapter_config.json  adapter_model.safetensors  tokenizer.json …    or the updates alone, as PEFT keeps them
OUT/metrics.jsonl  state/                                           see `output`
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gptedge.chat_template import ChatTemplate, chat_template_of
from gptedge.checkpoint import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, Checkpoint, weights_id
from gptedge.errors import CheckpointError, DataError, UsageError
from gptedge.family_files import is_stored, write_like
from gptedge.lora_files import Adapter, write_adapter
from gptedge.safetensors import FloatArray
from gptedge.text import counted
from gptedge.tokenizer import Tokenizer
from gptedge.train.chat_data import Records, read_records
from gptedge.train.chat_examples import Encoder, Example, default_template
from gptedge.train.finetune_config import FinetuneConfig
from gptedge.train.lora import add_lora, merged_weights, updates
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
from gptedge.train.packing import PackedExamples
from gptedge.train.parts import set_up_torch
from gptedge.train.qat import RoundedLoss, fake_quantize, rounded_weights
from gptedge.train.sample import OnModel
from gptedge.train.trainer import OnMessage, OnStep, Trainer, check_patience


@dataclass(frozen=True)
class FinetuneResult:
    checkpoint: Path
    examples: int
    """Conversations, and pieces of plain text, that were learned from."""
    truncated: int
    """Conversations that lost their beginning, for the context is shorter."""
    left_out: int
    """Records that could not be used."""
    steps: int
    weights_step: int
    """The step whose weights were written: the last, or under patience that of the lowest validation loss."""
    tokens_seen: int
    loss: float
    """Of the last step, in nats per learned token."""
    val_loss: float | None
    """None when nothing is held out."""
    seconds: float
    """Of training, all sessions of a resumed run together."""
    tokens_per_second: float
    parameters: int
    trained_parameters: int
    precision: str


def finetune(
    source: Checkpoint,
    paths: Sequence[Path],
    out: Path,
    *,
    config: FinetuneConfig,
    skip_bad: bool = False,
    resume: bool = False,
    force: bool = False,
    on_step: OnStep = lambda report: None,
    on_message: OnMessage = lambda message: None,
    on_model: OnModel | None = None,
) -> FinetuneResult:
    """Teach `source` the records in `paths`, and write what it became to `out`.

    With `resume`, go on from the state in `out` to exactly what an uninterrupted run would have come to, or begin where
    there is no run yet. `on_model` is shown the model, updates and all, before its first step.
    Raises OutputExistsError, UsageError, DataError, CheckpointError, TrainingError; KeyboardInterrupt saves the state.
    """
    out = Path(out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("fine-tuning runs in one process; start it without torchrun")
    if out.resolve() == source.path.resolve():
        raise UsageError(f"{out} is the source, and would be overwritten; choose another output")
    resumed = check_output(out, resume=resume, force=force, on_message=on_message)
    with alone_in(out):
        return _finetune(source, paths, out, config, resumed, skip_bad, on_step, on_message, on_model)


def _finetune(
    source: Checkpoint,
    paths: Sequence[Path],
    out: Path,
    config: FinetuneConfig,
    resumed: bool,
    skip_bad: bool,
    on_step: OnStep,
    on_message: OnMessage,
    on_model: OnModel | None,
) -> FinetuneResult:
    set_up_torch(config)
    records = read_records(paths, skip_bad=skip_bad, without=out)
    lesson = _prepare(source, records, config, on_message)
    torch.manual_seed(config.seed)
    model = _model(source, config)
    if resumed:
        reopen_run(out, config, lesson.identity)
    else:
        begin_run(out, config, lesson.identity, lambda folder: None)
    trained: nn.Module = RoundedLoss(model) if config.qat else model
    trainer = Trainer(
        lesson.limited(config),
        trained,
        lesson.batches,
        folder=out / STATE,
        metrics=out / METRICS,
        on_message=on_message,
    )
    if resumed:
        resume_trainer(trainer, out, on_message)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    on_message(
        f"model: {lesson.parameters:,} parameters, {count:,} trained; {precision_line(trainer)}; "
        f"{counted(torch.get_num_threads(), 'thread')}"
    )
    if on_model is not None:
        on_model(model, _tokenizer(source))
    trainer.train(on_step)
    if config.adapter and CHAT_TEMPLATE not in source.side_files and CHAT_TEMPLATE in lesson.side_files:
        on_message(
            f"template: copy {out / CHAT_TEMPLATE} into the model's folder before you export it with --lora-inputs"
        )
    put_checkpoint(out, lambda folder: _write(folder, source, model, lesson, config))
    return FinetuneResult(
        checkpoint=out,
        examples=lesson.examples,
        truncated=lesson.truncated,
        left_out=len(records.bad),
        steps=trainer.step,
        weights_step=trainer.weights_step,
        tokens_seen=trainer.tokens_seen,
        loss=trainer.loss,
        val_loss=trainer.val_loss,
        seconds=trainer.elapsed_s,
        tokens_per_second=trainer.tokens_seen / trainer.elapsed_s,
        parameters=lesson.parameters,
        trained_parameters=count,
        precision=trainer.precision,
    )


# ---- what is learned -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lesson:
    batches: PackedExamples
    examples: int
    truncated: int
    side_files: dict[str, bytes]
    """The source's, and a chat template where it had none and needs one."""
    identity: dict[str, str]
    """What a resumed run must find the same."""
    parameters: int

    def limited(self, config: FinetuneConfig) -> FinetuneConfig:
        """With its epochs as a number of steps, where no other bound is set."""
        if config.max_steps is not None or config.max_seconds is not None:
            return config
        return replace(config, max_steps=max(1, math.ceil(config.epochs * self.batches.per_epoch)))


def _prepare(source: Checkpoint, records: Records, config: FinetuneConfig, on_message: OnMessage) -> _Lesson:
    """Turn records into batches; all that can be wrong with them is found here, before anything is written."""
    tokenizer, ends = _tokenizer(source), _end_ids(source)
    side_files, template = dict(source.side_files), chat_template_of(source.side_files)
    if template.is_continuation and any(not isinstance(record, str) for record in records.items):
        text = default_template(tokenizer, tokenizer.id_to_token(ends[0]) or "")
        side_files[CHAT_TEMPLATE], template = text.encode(), ChatTemplate(text, {})
        on_message(f"template: the model has none for chats; it gets one, {CHAT_TEMPLATE} in OUT")
    context = min(config.context_length, source.config.context_length)
    made = Encoder(tokenizer, template, ends).examples(records.items, context)
    for note in records.notes():
        on_message(f"data: {note}")
    if not made.items:
        raise DataError(
            f"nothing to learn: none of {made.dropped:,} examples has a token to learn among its last {context}; "
            f"raise --context (the model's is {source.config.context_length}), or give shorter ones"
        )
    held_out, kept = _split(made.items, config)
    cut = f"; {made.truncated} lost their beginning to fit {context} tokens" if made.truncated else ""
    cut += f"; {made.dropped:,} left out, with nothing to learn in what is left" if made.dropped else ""
    learned = sum(e.n_learned for e in kept)
    on_message(
        f"data: {counted(len(kept), 'example')}, {counted(learned, 'token')} to learn, {len(held_out):,} held out{cut}"
    )
    assert config.batch_size is not None
    batches = PackedExamples(kept, held_out, batch_size=config.batch_size, context=context, seed=config.seed)
    check_patience(config, batches)
    weights = source.weights()
    identity = {"data_sha256": _digest(made.items), "source_sha256": weights_id(weights)}
    parameters = sum(math.prod(t.shape) for t in weights.values())
    return _Lesson(batches, len(kept), made.truncated, side_files, identity, parameters)


def _tokenizer(source: Checkpoint) -> Tokenizer:
    if TOKENIZER not in source.side_files:
        raise CheckpointError(f"{source.path} has no {TOKENIZER}; give one with --tokenizer FILE")
    tokenizer, config = (json.loads(source.side_files.get(name, b"{}")) for name in (TOKENIZER, TOKENIZER_CONFIG))
    return Tokenizer.from_dict(tokenizer, config)


def _end_ids(source: Checkpoint) -> tuple[int, ...]:
    """Tokens at which the runtime stops, the tokenizer's own end of text first."""
    stated = json.loads(source.side_files.get(GENERATION_CONFIG, b"{}")).get("eos_token_id")
    stated = source.hf_config.get("eos_token_id") if stated is None else stated
    ids: list[int] = stated if isinstance(stated, list) else [] if stated is None else [stated]
    own = _tokenizer(source).eos_id
    if own is not None and (own in ids or not ids):
        ids = [own, *ids]
    if not ids:
        raise CheckpointError(f"{source.path} names no end-of-text token; add eos_token_id to its {GENERATION_CONFIG}")
    return tuple(dict.fromkeys(ids))


def _split(examples: list[Example], config: FinetuneConfig) -> tuple[list[Example], list[Example]]:
    """Those held out, and the others; at least one is learned."""
    order = np.random.default_rng(config.seed).permutation(len(examples))
    count = min(int(len(examples) * config.validation_fraction), len(examples) - 1)
    return [examples[i] for i in order[:count]], [examples[i] for i in sorted(order[count:])]


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for e in examples:
        digest.update(hashlib.sha256(e.ids.tobytes() + e.learned.tobytes()).digest())
    return digest.hexdigest()


# ---- the model -----------------------------------------------------------------------------------------------------


def _model(source: Checkpoint, config: FinetuneConfig) -> GPT:
    model = GPT.from_checkpoint(source)
    if config.lora_rank:
        add_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            targets=config.lora_targets,
            through_weights=config.qat is not None,
        )
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_stored(source.family.files, name))
    if config.qat:
        fake_quantize(model, config.qat)
    return model


def _write(folder: Path, source: Checkpoint, model: GPT, lesson: _Lesson, config: FinetuneConfig) -> None:
    if config.adapter:
        for name, content in lesson.side_files.items():
            (folder / name).write_bytes(content)
        made = Adapter(updates(model), lesson.identity["source_sha256"])
        write_adapter(folder, made, source.family.files, source.config, base_name=str(source.path))
        return
    tensors = rounded_weights(model) if config.qat else merged_weights(model)
    weights: dict[str, FloatArray] = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    write_like(folder, source, weights, lesson.side_files)
