"""nanoGPT's `.pt` checkpoints, {"model": state_dict, "model_args": {…}, …}, as `Checkpoint`s.

Read through torch's restricted unpickler and a memory map: a file that asks for any code is refused. The tokenizer is
not in the file (it is tiktoken's gpt2, or a pickled `meta.pkl`, which is not read), so there are no side files. Files
written before nanoGPT moved to the exact GELU cannot be told from later ones, and are read as later ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptedge.checkpoint import Checkpoint
from gptedge.errors import CheckpointError, MissingExtraError
from gptedge.safetensors import FloatArray, Tensor

_COMPILED = "_orig_mod."  # what torch.compile puts before every name
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks
_HEAD, _TABLE = "lm_head.weight", "transformer.wte.weight"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
# config.json's key (GPT-2's own) -> key of model_args.
_SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "block_size",
    "vocab_size": "vocab_size",
}


def open_nanogpt(path: Path) -> Checkpoint:
    """A nanoGPT file as a checkpoint. Raises CheckpointError when it is damaged, is another kind, or holds code."""
    path = Path(path)
    content = _load(path)
    state, arguments = (content.get(k) if isinstance(content, Mapping) else None for k in ("model", "model_args"))
    if not isinstance(state, Mapping) or not isinstance(arguments, Mapping):
        raise CheckpointError(f"{path} is not a nanoGPT checkpoint: it has no model and model_args")
    weights = {str(name).removeprefix(_COMPILED): value for name, value in state.items()}
    weights = {name: value for name, value in weights.items() if not name.endswith(_BUFFERS)}
    tensors = {name: _tensor(path, name, value) for name, value in weights.items()}
    return Checkpoint(path, _config(path, arguments, weights), tensors)


def _load(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise MissingExtraError('reading .pt files needs torch; pip install "gptedge[train]"') from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} cannot be read: {_reason(str(e))}") from None


def _reason(message: str) -> str:
    """torch's advice runs over many lines, some of them dangerous; keep what was wrong."""
    if refused := re.search(r"GLOBAL ([\w.]+)", message):
        return f"it asks to run {refused[1]}, and only tensors and plain values are read"
    if "mmap" in message:
        return "it has the format from before torch 1.6; load and save it with a newer torch"
    first_line = next(iter(message.strip().splitlines()), "no reason given")
    return f"it is damaged or not torch's ({first_line[:120]})"


def _config(path: Path, arguments: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {ours: arguments.get(theirs) for ours, theirs in _SIZES.items()}
    for ours, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path}: model_args has {_SIZES[ours]} {value!r}; it must be a positive integer")
    return {
        "architectures": ["NanoGPT"],
        "model_type": "nanogpt",
        **sizes,
        "bias": bool(arguments.get("bias", True)),
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": _is_tied(weights),
        "torch_dtype": "float32",
    }


def _is_tied(weights: Mapping[str, Any]) -> bool:
    head, table = weights.get(_HEAD), weights.get(_TABLE)
    if head is None or table is None or head.data_ptr() == table.data_ptr():
        return True
    return bool(head.shape == table.shape and (head == table).all())


def _tensor(path: Path, name: str, value: Any) -> Tensor:
    kind = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    if kind not in _DTYPES:
        raise CheckpointError(f"{path}: {name} is {kind}; a tensor of a floating kind is needed")

    def read() -> FloatArray:
        return np.ascontiguousarray(value.detach().float().numpy())

    return Tensor(tuple(value.shape), _DTYPES[kind], read)
