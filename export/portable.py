"""The same decoder in standard ONNX operators alone: what each fused operator of the decoder means, spelled out.

decoder.py stays the one description of the model; a PortableGraph writes its fused operators as expressions. Which
tokens a query sees is an explicit mask: of attention with a cache, versions of the specification and of its kernels
disagree on where `is_causal` begins. The KV cache grows: present is past with the new tokens behind it.

Shapes: B batch, T new tokens, S past + new tokens, H n_head, K n_kv_head, E head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from gptedge.export.graph import Graph
from gptedge.graph_io import ATTENTION_MASK, INPUT_IDS

_BOOL = onnx.TensorProto.BOOL
_END = np.iinfo(np.int64).max


class PortableGraph(Graph):
    opsets = (helper.make_opsetid("", 23),)  # the first with Attention, RotaryEmbedding and RMSNormalization
    ir_version = 11

    def op(self, kind: str, *inputs: str, name: str, out: Sequence[str] | str = "", **attributes: Any) -> str:
        spelled = _STANDARD.get(kind)
        if spelled is None:
            return super().op(kind, *inputs, name=name, out=out, **attributes)
        return spelled(self, *inputs, name=name, out=out, **attributes)


def _product(g: Graph, x: str, weight: str, *, name: str, out: str, transB: int) -> str:
    assert transB
    return g.op("MatMul", x, g.once("Transpose", weight, name=f"{weight}.turned", perm=[1, 0]), name=name, out=out)


def _rms_norm(g: Graph, x: str, gain: str, *, name: str, out: str, axis: int, epsilon: float) -> str:
    return g.op("RMSNormalization", x, gain, name=name, out=out, axis=axis, epsilon=epsilon)


def _sum_and_norm(kind: str) -> Callable[..., str]:
    def spelled(g: Graph, x: str, update: str, *weights: str, name: str, out: Sequence[str], epsilon: float) -> str:
        total = g.op("Add", x, update, name=out[3])
        return g.op(kind, total, *weights, name=name, out=out[0], axis=-1, epsilon=epsilon)

    return spelled


def _silu(g: Graph, x: str, *, name: str, out: str, alpha: float) -> str:
    assert alpha == 1.0
    return g.op("Mul", x, g.op("Sigmoid", x, name=f"{name}.gate"), name=name, out=out)


def _attention(
    g: Graph,
    q: str,
    k: str,
    v: str,
    past_key: str,
    past_value: str,
    _lengths: str,
    _longest: str,
    *rotary: str,
    name: str,
    out: Sequence[str],
    num_heads: int,
    kv_num_heads: int,
    do_rotary: int,
    rotary_interleaved: int,
    local_window_size: int = 0,
    **options: float,
) -> str:
    """[B, T, H * E] -> [B, T, H * E]; `options` are scale and softcap, which both operators have."""
    q, k, v = _heads(g, (q, k, v), (num_heads, kv_num_heads, kv_num_heads), name)
    if do_rotary:
        assert not rotary_interleaved
        q, k = (g.op("RotaryEmbedding", x, *rotary, _positions(g), name=f"{x}.rotated") for x in (q, k))
    y = g.op(
        "Attention",
        *(q, k, v, _mask(g, local_window_size), past_key, past_value),
        name=f"{name}.heads",
        out=["", *out[1:]],
        **options,
    )
    rows = g.op("Transpose", y, name=f"{name}.rows", perm=[0, 2, 1, 3])  # [B, T, H, E]
    return g.op("Reshape", rows, g.constant("joined_heads", [0, 0, -1]), name=name, out=out[0])


def _heads(g: Graph, qkv: tuple[str, str, str], counts: tuple[int, int, int], name: str) -> list[str]:
    """q, k and v, or one packed tensor of all three, as [B, H | K, T, E] each."""
    if qkv[1]:
        split = [_split(g, x, count) for x, count in zip(qkv, counts, strict=True)]
    else:
        split = [f"{name}.{part}.heads" for part in "qkv"]
        sizes = g.constant("qkv_heads", counts)
        g.op("Split", _split(g, qkv[0], sum(counts)), sizes, name=f"{name}.qkv.parts", out=split, axis=2)
    return [g.op("Transpose", x, name=f"{x}.turned", perm=[0, 2, 1, 3]) for x in split]


def _split(g: Graph, x: str, count: int) -> str:
    """[B, T, count * E] -> [B, T, count, E]"""
    return g.op("Reshape", x, g.constant(f"split_{count}", [0, 0, count, -1]), name=f"{x}.split")


def _positions(g: Graph) -> str:
    """Each new token's position, int64 [B, T]: how many tokens of its text, padding aside, come before it."""
    counted = g.once("CumSum", ATTENTION_MASK, g.constant("index_1", 1), name="positions.counted")
    before = g.once("Sub", counted, g.constant("one", [1]), name="positions.before")
    every = g.once("Max", before, g.constant("zero", [0]), name="positions.every")  # padding has none
    end, axis = g.constant("end", [_END]), g.constant("time_axis", [1])
    return g.once("Slice", every, _less_new(g), end, axis, name="positions")


def _less_new(g: Graph) -> str:
    """-T, int64 [1]: where the new tokens start, counted from the end."""
    new = g.once("Shape", INPUT_IDS, name="new", start=1, end=2)
    return g.once("Neg", new, name="less_new")


def _mask(g: Graph, window: int) -> str:
    """Which tokens each new one sees, bool [B, 1, T, S]: those up to itself, padding aside, of the window if any.

    It sees itself in any case, so that rows of padding hold numbers.
    """
    if not window:
        return g.once("And", _up_to_itself(g), _attended(g), name="mask")
    near = g.once("Less", _distance(g), g.constant(f"window_{window}", window), name=f"near_{window}")
    return g.once("And", _mask(g, 0), near, name=f"mask_{window}")


def _distance(g: Graph) -> str:
    """How many tokens before each new one every token lies, int64 [T, S]; negative behind it."""
    bounds = [g.constant("zero_scalar", 0), g.once("Squeeze", _total(g), name="total_scalar")]
    every = g.once("Range", *bounds, g.constant("index_1", 1), name="every")
    new = g.once("Slice", every, _less_new(g), g.constant("end", [_END]), name="new_places")
    return g.once("Sub", g.once("Unsqueeze", new, g.constant("time_axis", [1]), name="column"), every, name="distance")


def _total(g: Graph) -> str:
    return g.once("Shape", ATTENTION_MASK, name="total", start=1, end=2)


def _up_to_itself(g: Graph) -> str:
    return g.once("GreaterOrEqual", _distance(g), g.constant("zero_scalar", 0), name="up_to_itself")


def _attended(g: Graph) -> str:
    given = g.once("Cast", ATTENTION_MASK, name="given", to=_BOOL)
    row = g.once("Unsqueeze", given, g.constant("row_axes", [1, 2]), name="given.row")  # [B, 1, 1, S]
    itself = g.once("Equal", _distance(g), g.constant("zero_scalar", 0), name="itself")
    return g.once("Or", row, itself, name="attended")


_STANDARD: dict[str, Callable[..., str]] = {
    "FusedMatMul": _product,
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipSimplifiedLayerNormalization": _sum_and_norm("RMSNormalization"),
    "SkipLayerNormalization": _sum_and_norm("LayerNormalization"),
    "QuickGelu": _silu,
    "GroupQueryAttention": _attention,
}
"""Fused operator -> what writes it in standard ones, given its inputs, name, outputs and attributes."""
