"""A bundle's logits, from its session, and its attention: the queries and keys that its own graph computes, so that a
quantized bundle shows what it does, not what its source did. See `explain`.

The attention nodes' queries, cosines and sines are made outputs of the graph, beside the keys and values that it gives
anyway. The weights computed from them are multiplied by the values and set against what the graph's node gave: maps
that do not reproduce it are not shown. Maps need the `onnx` package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptedge.bundle import GRAPH, Bundle
from gptedge.errors import BundleError
from gptedge.evaluate.explain import Floats, Look, too_many_weights
from gptedge.graph_io import ATTENTION_MASK, INPUT_IDS, PAST_PREFIX, POSITION_IDS, present_key, present_value
from gptedge.loading import load
from gptedge.model import Model
from gptedge.runtime.onnx_runtime import import_onnxruntime
from gptedge.runtime.session import PREFILL_CHUNK, Session
from gptedge.tokenizer import Tokenizer

if TYPE_CHECKING:
    import onnx

_TOLERANCE = 1e-3
"""Of the largest value that an attention node gives; float32 differs by a hundredth of it."""


@dataclass(frozen=True)
class Subject:
    model: Model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def kind(self) -> str:
        return self.model.bundle.recipe

    @property
    def context_length(self) -> int:
        return self.model.session.context_length

    def look(self, ids: Sequence[int]) -> Look:
        session = self.model.session
        logits = every_logit(session, ids)
        threads = session.threads
        session.close()  # its weights are about to be loaded once more
        return Look(logits, *attention(self.model.bundle, ids, threads))


def open_subject(path: Path, threads: int | None) -> Subject:
    return Subject(load(path, threads=threads, provider="cpu"))


def every_logit(session: Session, ids: Sequence[int]) -> Floats:
    """[T, vocab_size]"""
    cache = session.new_cache()
    starts = range(0, len(ids), PREFILL_CHUNK)
    return np.concatenate([session.run(ids[i : i + PREFILL_CHUNK], cache, every_row=True) for i in starts])


def attention(bundle: Bundle, ids: Sequence[int], threads: int) -> tuple[Floats | None, str | None]:
    """[n_layer, n_head, T, T], or None and a line that says why."""
    try:
        from gptedge.onnx_file import load_graph
    except ModuleNotFoundError as e:
        return None, f"attention maps of a bundle need {e.name}; install gptedge[quantize]"
    model = load_graph(bundle.path / GRAPH)
    nodes = [n for n in model.graph.node if n.op_type in _READERS]
    if not nodes or any(_unknown(n) for n in nodes):
        return None, "no attention maps: this graph computes attention in a way that gptedge does not read"
    if note := too_many_weights(len(nodes), _n_head(nodes[0], bundle), len(ids)):
        return None, note
    values = _run(model, nodes, bundle.path, ids, threads)
    maps = [_READERS[n.op_type](n, i, values) for i, n in enumerate(nodes)]
    if any(weights is None for weights in maps):
        return None, "no attention maps: what was computed does not reproduce this graph's own attention"
    return np.stack([m for m in maps if m is not None]), None


# ---- the graph, asked for more -------------------------------------------------------------------------------------


def _run(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], folder: Path, ids: Sequence[int], threads: int
) -> dict[str, Any]:
    """What the attention nodes read and give for a text, by name."""
    from onnx import ValueInfoProto

    from gptedge.onnx_file import read_initializer

    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    given = {o.name for o in graph.output}
    wanted = {name for n in nodes for name in (*n.input, *n.output) if name and not name.startswith(PAST_PREFIX)}
    inputs = {i.name for i in graph.input} - stored.keys()
    graph.output.extend(ValueInfoProto(name=name) for name in sorted(wanted - stored.keys() - given - inputs))
    feeds = _feeds(model, inputs, ids)
    names = sorted(wanted - stored.keys() - inputs)
    made = zip(names, _open(model, folder, threads).run(names, feeds), strict=True)
    return {name: read_initializer(stored[name], folder) for name in wanted & stored.keys()} | feeds | dict(made)


def _feeds(model: onnx.ModelProto, inputs: set[str], ids: Sequence[int]) -> dict[str, Any]:
    """A text of its own, and caches of no tokens."""
    from onnx import helper

    known = {
        INPUT_IDS: np.array([ids], np.int64),
        ATTENTION_MASK: np.ones((1, len(ids)), np.int64),
        POSITION_IDS: np.arange(len(ids), dtype=np.int64)[None],
    }
    feeds = {name: value for name, value in known.items() if name in inputs}
    for value in model.graph.input:
        if value.name.startswith(PAST_PREFIX):
            kind = value.type.tensor_type
            heads, width = (kind.shape.dim[axis].dim_value for axis in (1, 3))
            feeds[value.name] = np.zeros((1, heads, 0, width), helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return feeds


def _open(model: onnx.ModelProto, folder: Path, threads: int) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's exceptions share no public base
        raise BundleError(f"the graph's attention cannot be run: {str(e).splitlines()[0]}") from None


# ---- operators of attention: inputs and attributes as their specifications name them ---------------------------------

_ATTRIBUTES = {
    "GroupQueryAttention": {
        *("num_heads", "kv_num_heads", "do_rotary", "rotary_interleaved", "local_window_size", "scale", "softcap"),
        *("k_quant_type", "v_quant_type", "kv_cache_bit_width"),
    },
    "Attention": {"scale", "softcap"},
}
_INPUTS = {"GroupQueryAttention": {9, 10, 11, 14, 15}, "Attention": {6}}
"""Those that would change the weights in ways not read here: positions, biases, sinks, norms."""
_SCALES = slice(12, 14)  # of GroupQueryAttention's cache, where that is of integers


def _unknown(node: onnx.NodeProto) -> bool:
    """Whether it does more than is read here."""
    options = _options(node)
    if options.keys() - _ATTRIBUTES[node.op_type] or options.get("kv_cache_bit_width", 8) != 8:
        return True
    return any(node.input[i] for i in _INPUTS[node.op_type] if i < len(node.input))


def _options(node: onnx.NodeProto) -> dict[str, float]:
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _n_head(node: onnx.NodeProto, bundle: Bundle) -> int:
    given = _options(node).get("num_heads") or bundle.config.get("num_attention_heads") or bundle.config.get("n_head")
    return int(given or 1)


def _grouped(node: onnx.NodeProto, i: int, values: Mapping[str, Any]) -> Floats | None:
    """Microsoft's GroupQueryAttention, which rotates q and k itself: keys come rotated out of its cache."""
    from gptedge.export.reference import attention_weights

    o = _options(node)
    heads, kv_heads = int(o["num_heads"]), int(o["kv_num_heads"])
    k, v = (np.asarray(values[name][0], np.float32) for name in (present_key(i), present_value(i)))  # [K, T, E]
    if scales := node.input[_SCALES]:
        k, v = (_as_numbers(x, values[scale]) for x, scale in zip((k, v), scales, strict=True))
    n, width = k.shape[1], k.shape[2]
    packed = np.asarray(values[node.input[0]][0], np.float32).reshape(n, -1, width)  # [T, H (+ 2K), E]
    q = packed[:, :heads].swapaxes(0, 1)  # [H, T, E]
    if o.get("do_rotary"):
        tables = (np.asarray(values[name], np.float32)[:n] for name in node.input[7:9])
        q = _rotate(q, *tables, interleaved=bool(o.get("rotary_interleaved")))
    weights = attention_weights(
        q,
        k,
        window=max(0, int(o.get("local_window_size", 0))),
        scale=o.get("scale") or None,
        softcap=o.get("softcap") or None,
    )
    given = np.asarray(values[node.output[0]][0], np.float32).reshape(n, heads, width).swapaxes(0, 1)
    assert len(k) == kv_heads
    return _if_same(weights, v, given)


def _as_numbers(integers: Floats, scales: Floats) -> Floats:
    """Keys or values [K, T, E] of a cache of 8 bits, with one scale, or one for each channel of each head."""
    return integers * (scales.reshape(len(integers), 1, -1) if scales.size > 1 else scales.ravel())


def _rotate(x: Floats, cos: Floats, sin: Floats, *, interleaved: bool) -> Floats:
    """[H, T, E] by tables of [T, R / 2]; dimension j pairs with j + R / 2, or with its neighbour."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    joined = np.stack(pair, -1).reshape(turned.shape) if interleaved else np.concatenate(pair, -1)
    return np.concatenate([joined, rest], -1)


def _standard(node: onnx.NodeProto, i: int, values: Mapping[str, Any]) -> Floats | None:
    """ONNX's own Attention (opset 23), as portable graphs have it: q rotated, a mask that says what is seen."""
    o = _options(node)
    q = np.asarray(values[node.input[0]][0], np.float32)  # [H, T, E]
    k, v = (np.asarray(values[name][0], np.float32) for name in (present_key(i), present_value(i)))  # [K, T, E]
    scores = q @ np.repeat(k, len(q) // len(k), 0).swapaxes(1, 2) * np.float32(o.get("scale") or q.shape[-1] ** -0.5)
    if cap := o.get("softcap"):
        scores = np.float32(cap) * np.tanh(scores / np.float32(cap))
    scores = np.where(values[node.input[3]][0], scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    given = np.asarray(values[node.output[0]][0], np.float32)  # [H, T, E]
    return _if_same(scores / scores.sum(-1, keepdims=True), v, given)


def _if_same(weights: Floats, v: Floats, given: Floats) -> Floats | None:
    """The weights [H, T, T], if with the values [K, T, E] they give what the node gave, [H, T, E]."""
    ours = weights @ np.repeat(v, len(weights) // len(v), 0)
    return weights if np.abs(ours - given).max() <= _TOLERANCE * np.abs(given).max() else None


_READERS: Mapping[str, Callable[[Any, int, Mapping[str, Any]], Floats | None]] = {
    "GroupQueryAttention": _grouped,
    "Attention": _standard,
}
