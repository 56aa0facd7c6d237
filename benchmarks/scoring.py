"""How far a quantized model's predictions lie from the reference's: perplexity, divergence, same top token.

Windows of token ids run from an empty cache, and the positions of each window's second half count. Needs numpy and, for
graphs, onnxruntime; takes nothing from gptedge, so that gptedge's own evaluation is not its own judge.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Score:
    positions: int
    perplexity: float
    ppl_increase: float
    """perplexity over the reference's, less 1."""
    kl: float
    """Mean Kullback-Leibler divergence of the reference's distribution from this one, nats."""
    top1: float
    """Share of positions whose most likely token is the reference's."""


def cut(ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """The first `count` windows. Raises ValueError when there are fewer."""
    if len(ids) < count * length:
        raise ValueError(f"{count} windows of {length} take {count * length} tokens, and the text has {len(ids)}")
    return [list(ids[i * length : (i + 1) * length]) for i in range(count)]


def scored_rows(length: int) -> slice:
    """The positions of a window that count: those of its second half that have a next token."""
    return slice(length // 2, length - 1)


def score(windows: Sequence[Sequence[int]], got: Iterable[Floats], reference: Iterable[Floats]) -> Score:
    """Compare logits of the scored rows [rows, vocabulary], one array for each window."""
    nll, reference_nll, kl, same = [], [], [], []
    for window, q, p in zip(windows, map(log_softmax, got), map(log_softmax, reference), strict=True):
        targets = np.asarray(window[scored_rows(len(window)).start + 1 :])
        at = np.arange(len(targets))
        nll.append(-q[at, targets])
        reference_nll.append(-p[at, targets])
        kl.append((np.exp(p) * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    mean, reference_mean = (float(np.concatenate(x).mean(dtype=np.float64)) for x in (nll, reference_nll))
    return Score(
        positions=sum(map(len, kl)),
        perplexity=math.exp(mean),
        ppl_increase=math.expm1(mean - reference_mean),
        kl=float(np.concatenate(kl).mean(dtype=np.float64)),
        top1=float(np.concatenate(same).mean()),
    )


def log_softmax(x: Floats) -> Floats:
    """Over the last axis."""
    shifted = x - x.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64))).astype(np.float32)


def graph_logits(folder: Path, windows: Sequence[Sequence[int]], threads: int) -> Iterator[Floats]:
    """Logits of the scored rows of each window, from a folder's model.onnx."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; inputs with a default are warned of otherwise
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    make = [_input(node, _head_dim(folder)) for node in session.get_inputs()]
    for window in windows:
        ids = np.asarray([window], np.int64)
        (logits,) = session.run(["logits"], dict(f(ids) for f in make))
        yield logits[0, scored_rows(len(window))].astype(np.float32)


def _input(node: Any, head_dim: int) -> Callable[[npt.NDArray[np.int64]], tuple[str, npt.NDArray[Any]]]:
    """How one of the graph's inputs is made from token ids [1, tokens]; the cache is empty."""
    if node.name == "input_ids":
        return lambda ids: (node.name, ids)
    if node.name == "attention_mask":
        return lambda ids: (node.name, np.ones_like(ids))
    if node.name == "position_ids":
        return lambda ids: (node.name, np.arange(ids.shape[1])[None])
    empty = (1, node.shape[1], 0, node.shape[3] if isinstance(node.shape[3], int) else head_dim)
    return lambda ids: (node.name, np.zeros(empty, _NUMPY_TYPES[node.type]))


def _head_dim(folder: Path) -> int:
    """For graphs that leave the last axis of their cache open."""
    return int(json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"])


def size_mb(path: Path) -> float:
    """Of a GGUF file, or of a folder's graphs and their weights."""
    files = [path] if path.is_file() else [f for f in path.iterdir() if ".onnx" in f.name]
    return sum(f.stat().st_size for f in files) / 1e6
