"""A checkpoint's logits and attention, computed by the PyTorch GPT. Needs torch; see `explain`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptedge.checkpoint import TOKENIZER, TOKENIZER_CONFIG, Checkpoint
from gptedge.config import ModelConfig
from gptedge.errors import CheckpointError
from gptedge.evaluate.explain import Floats, Look, too_many_weights
from gptedge.export.sources import open_source
from gptedge.runtime.threads import checked_threads
from gptedge.tokenizer import Tokenizer
from gptedge.train.model import GPT, Attention, attention_weights, queries_keys_values, rope_tables


@dataclass(frozen=True)
class Subject:
    model: GPT
    tokenizer: Tokenizer
    kind: str = "checkpoint"

    @property
    def context_length(self) -> int:
        return self.model.config.context_length

    def look(self, ids: Sequence[int]) -> Look:
        return look(self.model, ids)


def open_subject(path: Path, threads: int | None) -> Subject:
    """Raises CheckpointError or UnsupportedModelError for what is no checkpoint, or has no tokenizer; UsageError."""
    if threads is not None:
        torch.set_num_threads(checked_threads(threads))
    checkpoint = open_source(path)
    tokenizer = _tokenizer(checkpoint)
    return Subject(GPT.from_checkpoint(checkpoint), tokenizer)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    files = checkpoint.side_files
    if TOKENIZER not in files:
        raise CheckpointError(f"{checkpoint.path} has no {TOKENIZER}, so its text cannot be split; put one beside it")
    config = json.loads(files[TOKENIZER_CONFIG]) if TOKENIZER_CONFIG in files else None
    return Tokenizer.from_dict(json.loads(files[TOKENIZER]), config)


@torch.no_grad()
def look(model: GPT, ids: Sequence[int]) -> Look:
    """Logits and every head's weights. The model runs as it always does; what each attention read is noted on the way,
    and its weights are computed from that."""
    c, n = model.config, len(ids)
    note = too_many_weights(c.n_layer, c.n_head, n)
    read: list[Tensor] = []  # [1, T, C] of each layer
    layers = [layer.attn for layer in model.blocks if isinstance(layer.attn, Attention)]
    hooks = [layer.q.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])) for layer in layers]
    try:
        logits = model(torch.tensor([list(ids)]))[0]  # [T, V]
    finally:
        for hook in hooks:
            hook.remove()
    if note:
        return Look(logits.numpy(), None, note)
    maps = [_weights(c, i, layer, x) for i, (layer, x) in enumerate(zip(layers, read, strict=True))]
    return Look(logits.numpy(), np.stack(maps))


def _weights(c: ModelConfig, i: int, layer: Attention, x: Tensor) -> Floats:
    """[H, T, T] of layer i, which read x [1, T, C]."""
    rope = rope_tables(c.rope_of(i), torch.arange(x.shape[1])) if c.position == "rope" else None
    q, k, _ = queries_keys_values(c, layer, x, rope)
    weights = attention_weights(q, k, window=c.window(i), scale=c.attn_scale, softcap=c.attn_softcap)
    return weights[0].float().numpy()
