"""What a graph's inputs and outputs say of its model, and config.json where they leave a size open.

Graphs of other exporters name some sizes instead of giving them, and know nothing of the optional inputs; their
caches grow.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptedge.bundle import GRAPH, Bundle
from gptedge.errors import BundleError
from gptedge.graph_io import (
    ATTENTION_MASK,
    END_LOGIT,
    FIRST_LOGIT,
    INPUT_IDS,
    LOGITS,
    PAST_PREFIX,
    POSITION_IDS,
    past_key,
    past_names,
    present_names,
)
from gptedge.runtime.kv_cache import CacheLayout

_DTYPES: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_CACHE_DTYPES: dict[str, npt.DTypeLike] = {**_DTYPES, "tensor(int8)": np.int8}
"""The scales of an int8 cache are the graph's own."""
_APPENDS_IN_PLACE = b"GroupQueryAttention"
"""The one operator that writes new keys and values into the very buffer that holds the old ones."""

# Names that configurations give to a size, the likeliest first: genai_config.json's, then config.json's.
_CONTEXT_LENGTH = ("context_length", "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_N_HEAD = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_N_KV_HEAD = ("num_key_value_heads", *_N_HEAD)
_HEAD_DIM = ("head_size", "head_dim")
_N_EMBD = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class Signature:
    n_layer: int
    n_head: int
    """Query heads; 1 where no configuration says how many."""
    cache: CacheLayout
    vocab_size: int
    logits_dtype: npt.DTypeLike
    context_length: int
    takes_positions: bool
    picks_rows: bool
    """It has first_logit and end_logit."""


def read_signature(bundle: Bundle, session: Any, device: str) -> Signature:
    """`session` is an onnxruntime InferenceSession of the bundle's graph, `device` the one it runs on.

    Raises BundleError when the graph is not a decoder with a KV cache of a form that is known.
    """
    inputs = {i.name: i for i in session.get_inputs()}
    outputs = {o.name: o for o in session.get_outputs()}
    n_layer = sum(name.startswith(PAST_PREFIX) for name in inputs) // 2
    _check_names(bundle, inputs, outputs, n_layer)
    past = [inputs[name] for name in past_names(n_layer)]
    for value in past:
        _check_kind(bundle, value, 4, _CACHE_DTYPES)
    _check_kind(bundle, outputs[LOGITS], 3, _DTYPES)
    sizes = _sizes(bundle)
    return Signature(
        n_layer=n_layer,
        n_head=_first(sizes, _N_HEAD) or 1,
        cache=CacheLayout(
            shapes=tuple((_dim(p, 1, sizes, _N_KV_HEAD, bundle), _dim(p, 3, sizes, _HEAD_DIM, bundle)) for p in past),
            dtype=_CACHE_DTYPES[past[0].type],
            shared=shares_buffer(bundle),
            device=device,
        ),
        vocab_size=_dim(outputs[LOGITS], 2, sizes, ("vocab_size",), bundle),
        logits_dtype=_DTYPES[outputs[LOGITS].type],
        context_length=context_length(sizes, bundle.path),
        takes_positions=POSITION_IDS in inputs,
        picks_rows={FIRST_LOGIT, END_LOGIT} <= {i.name for i in session.get_overridable_initializers()},
    )


def shares_buffer(bundle: Bundle) -> bool:
    """Whether past and present may be one buffer.

    genai_config.json has to say so, and the graph has to hold the operator that can: with any other, the tokens run so
    far would be read as more than they are. Growing tensors suit every graph.
    """
    stated = bundle.genai_config.get("search", {}).get("past_present_share_buffer")
    return bool(stated) and _holds(bundle.path / GRAPH, _APPENDS_IN_PLACE)


def _holds(path: Path, text: bytes) -> bool:
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0


def _check_names(bundle: Bundle, inputs: Mapping[str, Any], outputs: Mapping[str, Any], n_layer: int) -> None:
    known = [INPUT_IDS, ATTENTION_MASK, *past_names(n_layer)]
    missing = [n for n in known if n not in inputs]
    missing += [n for n in (LOGITS, *present_names(n_layer)) if n not in outputs]
    if missing or not n_layer:
        raise BundleError(
            f"{bundle.path / GRAPH} is not a decoder with a KV cache: it lacks {missing[0] if missing else past_key(0)}"
        )
    if other := sorted(set(inputs) - {*known, POSITION_IDS}):
        raise BundleError(f"{bundle.path / GRAPH} asks for the input {other[0]}, which gptedge does not know")


def _check_kind(bundle: Bundle, value: Any, rank: int, dtypes: Mapping[str, npt.DTypeLike]) -> None:
    if value.type not in dtypes or len(value.shape) != rank:
        raise BundleError(
            f"{bundle.path / GRAPH}: {value.name} is {value.type} of {len(value.shape)} dimensions; "
            f"{' or '.join(dtypes)} of {rank} is needed"
        )


def _sizes(bundle: Bundle) -> dict[str, Any]:
    """Every size the configurations give, by its own name; genai_config.json's first."""
    model = bundle.genai_config.get("model", {})
    return {**bundle.config, **model.get("decoder", {}), **model}


def context_length(sizes: Mapping[str, Any], where: Path) -> int:
    """Most tokens of a text, by any of the names that configurations give it. Raises BundleError without one."""
    length = _first(sizes, _CONTEXT_LENGTH)
    if length is None:
        raise BundleError(f"{where} does not say how long its context is; add {_CONTEXT_LENGTH[1]} to config.json")
    return length


def _dim(value: Any, axis: int, sizes: Mapping[str, Any], names: Sequence[str], bundle: Bundle) -> int:
    """A size of a graph's input or output: its own, or by one of `names` where it only has a symbol."""
    if isinstance(value.shape[axis], int):
        return value.shape[axis]
    size = _first(sizes, names)
    if size is None and names == _HEAD_DIM:
        width, heads = _first(sizes, _N_EMBD), _first(sizes, _N_HEAD)
        size = width // heads if width and heads else None
    if size is None:
        raise BundleError(
            f"{bundle.path / GRAPH} leaves axis {axis} of {value.name} open, and config.json has no {names[0]}"
        )
    return size


def _first(sizes: Mapping[str, Any], names: Sequence[str]) -> int | None:
    return next((int(sizes[name]) for name in names if sizes.get(name)), None)
