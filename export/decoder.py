"""The decoder as an ONNX graph, written straight from a checkpoint's tensors.

It reads like the PyTorch `GPT` in gptedge/train/model.py, function by function; that model is its oracle in the tests.
Attention is onnxruntime's GroupQueryAttention, which rotates q and k itself and, when past and present are one buffer,
appends to the KV cache in place. Linear weights keep the checkpoint's [out, in] layout, so exporting copies bytes.
A portable graph is the same one, for which portable.py spells onnxruntime's operators out in standard ones.

Shapes: B batch, T new tokens, S past + new tokens, D n_embd, F n_ff, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from gptedge.config import ModelConfig, rope_frequencies
from gptedge.errors import UnsupportedModelError
from gptedge.export.graph import Graph
from gptedge.export.portable import PortableGraph
from gptedge.export.rotary import MULTIPLE, is_spread, rotary_scale, spread_frequencies, spread_weights
from gptedge.graph_io import (
    ATTENTION_MASK,
    END_LOGIT,
    FIRST_LOGIT,
    INPUT_IDS,
    LOGITS,
    LORA_A,
    LORA_B,
    POSITION_IDS,
    past_key,
    past_value,
    present_key,
    present_value,
)
from gptedge.onnx_file import WeightFile
from gptedge.progress import Report, silent
from gptedge.safetensors import FloatArray, Tensor

Weights = Mapping[str, Tensor]
_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("QuickGelu", {"alpha": 1.0}),  # x * sigmoid(alpha * x)
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
}
_END = np.iinfo(np.int64).max


def build(
    config: ModelConfig,
    weights: Weights,
    file: WeightFile,
    *,
    half: bool = False,
    portable: bool = False,
    lora: bool = False,
    report: Report = silent,
) -> onnx.ModelProto:
    """The whole graph; weights are streamed to `file`.

    `half` stores matrices as float16, to be widened when loaded; `portable` uses standard operators alone; `lora` gives
    every linear layer the inputs of an adapter (see `graph_io`).
    """
    graph = PortableGraph(file) if portable else Graph(file)
    # The standard operator rotates whole heads, unless it is told otherwise.
    spread = is_spread(config, config.head_dim if portable else MULTIPLE)
    return _Decoder(config, weights, graph, half=half, spread=spread, lora=lora, report=report).forward()


class _Decoder:
    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        graph: Graph,
        *,
        half: bool,
        spread: bool,
        lora: bool,
        report: Report,
    ) -> None:
        self.c = config
        self.w = spread_weights(config, weights) if spread else weights
        self.g = graph
        self.half = half
        self.spread = spread
        self.lora = lora
        self.report = report

    def embed(self, ids: str) -> str:
        """[B, T] -> [B, T, D]"""
        x = self.g.op("Gather", self.weight("embed.weight"), ids, name="embed")
        if self.c.position == "learned":
            positions = self.g.input(POSITION_IDS, np.int64, ["batch_size", "sequence_length"])
            x = self.g.op(
                "Add",
                x,
                self.g.op("Gather", self.weight("position.weight"), positions, name="position"),
                name="embed.sum",
            )
        if self.c.embed_scale != 1.0:
            x = self.g.op("Mul", x, self.g.constant("embed_scale", self.c.embed_scale, np.float32), name="embed.scaled")
        return self.norm(x, "embed_norm")

    def norm(self, x: str, name: str) -> str:
        """RMSNorm or LayerNorm over the last axis; x itself where the family has no such norm."""
        if f"{name}.weight" not in self.w:
            return x
        kind = "SimplifiedLayerNormalization" if self.c.norm == "rms" else "LayerNormalization"
        return self.g.op(kind, x, *self.norm_weights(name), name=name, axis=-1, epsilon=self.c.norm_eps)

    def add_norm(self, x: str, update: str, name: str) -> tuple[str, str]:
        """The residual sum x + update, and its norm, in one node: (sum, norm), the same where there is no such norm."""
        if f"{name}.weight" not in self.w:
            return (self.g.op("Add", x, update, name=f"{name}.sum"),) * 2
        kind = "SkipSimplifiedLayerNormalization" if self.c.norm == "rms" else "SkipLayerNormalization"
        total = f"{name}.sum"
        normed = self.g.op(
            kind, x, update, *self.norm_weights(name), name=name, out=[name, "", "", total], epsilon=self.c.norm_eps
        )
        return total, normed

    def attention(self, x: str, i: int) -> str:
        """[B, T, D] -> [B, T, D]; reads and extends layer i's KV cache."""
        block = f"blocks.{i}.attn"
        q, k, v = self.query_key_value(x, block)
        rotary = self.rotary_tables(self.c.rope_of(i)) if self.c.position == "rope" else ()
        y = self.g.op(
            "GroupQueryAttention",
            *(q, k, v, past_key(i), past_value(i), *self.lengths, *rotary),
            name=block,
            out=["", present_key(i), present_value(i)],
            num_heads=self.c.n_head,
            kv_num_heads=self.c.n_kv_head,
            do_rotary=int(self.c.position == "rope"),
            rotary_interleaved=0,
            **self.attention_options(i),
        )
        return self.linear(self.wanted(y, i), f"{block}.o")

    def mlp(self, x: str, i: int) -> str:
        """[B, T, D] -> [B, T, D]"""
        block = f"blocks.{i}.mlp"
        if not self.c.gated:
            return self.linear(self.activation(self.linear(x, f"{block}.up"), block), f"{block}.down")
        both = self.linear(x, f"{block}.gate_up", f"{block}.gate", f"{block}.up")  # [B, T, 2F]
        gate, up = f"{block}.gate", f"{block}.up"
        self.g.op("Split", both, name=f"{block}.split", out=[gate, up], axis=-1, num_outputs=2)
        return self.linear(self.g.op("Mul", self.activation(gate, block), up, name=f"{block}.gated"), f"{block}.down")

    def block(self, x: str, normed: str, i: int) -> tuple[str, str]:
        """One layer, and the norm after it: the next layer's first, or the last of all. (residual stream, its norm)"""
        block, last = f"blocks.{i}", i + 1 == self.c.n_layer
        after = "norm" if last else f"blocks.{i + 1}.attn_norm"
        update = self.norm(self.attention(normed, i), f"{block}.attn_post_norm")
        x = self.wanted(x, i)
        if self.c.parallel:
            beside = self.norm(self.mlp(self.norm(x, f"{block}.mlp_norm"), i), f"{block}.mlp_post_norm")
            return self.add_norm(x, self.g.op("Add", update, beside, name=f"{block}.both"), after)
        x, normed = self.add_norm(x, update, f"{block}.mlp_norm")
        return self.add_norm(x, self.norm(self.mlp(normed, i), f"{block}.mlp_post_norm"), after)

    def forward(self) -> onnx.ModelProto:
        """input_ids [B, T] -> logits [B, T, V] and the extended KV cache."""
        g, c = self.g, self.c
        ids = g.input(INPUT_IDS, np.int64, ["batch_size", "sequence_length"])
        g.input(ATTENTION_MASK, np.int64, ["batch_size", "total_sequence_length"])
        x = self.embed(ids)
        for i in range(c.n_layer):
            for name in (past_key(i), past_value(i)):
                g.input(name, np.float32, ["batch_size", c.n_kv_head, "past_sequence_length", c.head_dim])
        normed = self.norm(x, "blocks.0.attn_norm")
        for i in range(c.n_layer):
            x, normed = self.block(x, normed, i)
            self.report(i + 1, c.n_layer, "layers")
        self.head(normed)
        g.output(LOGITS, np.float32, ["batch_size", "sequence_length", c.vocab_size])
        for i in range(c.n_layer):
            for name in (present_key(i), present_value(i)):
                g.output(name, np.float32, ["batch_size", c.n_kv_head, "total_sequence_length", c.head_dim])
        return g.model("decoder")

    def head(self, normed: str) -> str:
        """[B, end_logit - first_logit, D] -> logits of as many tokens"""
        g = self.g
        table = "embed.weight" if self.c.tie_embeddings else "head.weight"
        cap = self.c.logit_softcap
        if cap is None:
            return g.op("FusedMatMul", normed, self.weight(table), name="head", out=LOGITS, transB=1)
        product = g.op("FusedMatMul", normed, self.weight(table), name="head", transB=1)
        bound = g.constant("logit_softcap", cap, np.float32)
        part = g.op("Tanh", g.op("Div", product, bound, name="head.part"), name="head.bounded")
        return g.op("Mul", part, bound, name="head.capped", out=LOGITS)

    def wanted(self, x: str, i: int) -> str:
        """In the last layer, the tokens whose logits are wanted: behind its attention nothing looks at others."""
        if i + 1 < self.c.n_layer:
            return x
        first, end = self.wanted_bounds
        return self.g.op("Slice", x, first, end, self.g.constant("time_axis", [1]), name=f"{x}.wanted")

    @cached_property
    def wanted_bounds(self) -> tuple[str, str]:
        g = self.g
        return g.optional_input(FIRST_LOGIT, np.zeros(1, np.int64)), g.optional_input(END_LOGIT, np.full(1, _END))

    # ---- pieces ----------------------------------------------------------------------------------------------------

    def linear(self, x: str, name: str, *parts: str) -> str:
        """x @ W.T (+ bias); with `parts`, their rows stacked into one matrix."""
        parts = parts or (name,)
        y = self.g.op(
            "FusedMatMul", x, self.weight(f"{name}.weight", *(f"{p}.weight" for p in parts)), name=name, transB=1
        )
        y = self.adapted(x, y, name, parts) if self.lora else y
        if f"{parts[0]}.bias" not in self.w:
            return y
        bias = self.weight(f"{name}.bias", *(f"{p}.bias" for p in parts))
        return self.g.op("Add", y, bias, name=f"{name}.biased")

    def adapted(self, x: str, y: str, name: str, parts: Sequence[str]) -> str:
        """y + x @ A @ B, where the adapter's matrices are inputs that may be left out (arXiv:2106.09685)."""
        shapes = [self.w[f"{part}.weight"].shape for part in parts]
        n_out, n_in = sum(shape[0] for shape in shapes), shapes[0][1]
        rank = f"{name}.lora_rank"
        a = self.g.optional_input(name + LORA_A, np.zeros((n_in, 0), np.float32), [n_in, rank])
        b = self.g.optional_input(name + LORA_B, np.zeros((0, n_out), np.float32), [rank, n_out])
        thin = self.g.op("MatMul", x, a, name=f"{name}.lora.thin")  # [B, T, r]
        return self.g.op("Add", y, self.g.op("MatMul", thin, b, name=f"{name}.lora"), name=f"{name}.adapted")

    def weight(self, name: str, *parts: str) -> str:
        """A weight by name, or several with their rows stacked. Stored float16 is widened once, at load."""
        parts = parts or (name,)
        if not self.half or len(self.w[parts[0]].shape) < 2:
            return self.g.weight(name, (piece for part in parts for piece in self.w[part].pieces()))
        halves = (_halved(part, piece) for part in parts for piece in self.w[part].pieces())
        stored = self.g.weight(f"{name}.half", halves)
        return self.g.once("Cast", stored, name=name, to=onnx.TensorProto.FLOAT)

    def norm_weights(self, name: str) -> list[str]:
        return [self.weight(f"{name}.{kind}") for kind in ("weight", "bias") if f"{name}.{kind}" in self.w]

    def activation(self, x: str, block: str) -> str:
        name = f"{block}.act"
        if self.c.activation == "relu2":
            x = self.g.op("Relu", x, name=f"{name}.relu")
            return self.g.op("Mul", x, x, name=name)
        kind, attributes = _ACTIVATIONS[self.c.activation]
        return self.g.op(kind, x, name=name, **attributes)

    def query_key_value(self, x: str, block: str) -> tuple[str, str, str]:
        """One product for all three, which GroupQueryAttention takes packed, unless heads are normalised first."""
        qkv = self.linear(x, f"{block}.qkv", f"{block}.q", f"{block}.k", f"{block}.v")
        if not self.c.qk_norm:
            return qkv, "", ""
        q, k, v = f"{block}.q", f"{block}.k", f"{block}.v"
        sizes = self.g.constant("qkv_sizes", [self.c.q_size, self.c.kv_size, self.c.kv_size])
        self.g.op("Split", qkv, sizes, name=f"{block}.split", out=[q, k, v], axis=-1)
        if self.c.qk_norm_joint:
            return self.norm(q, f"{q}_norm"), self.norm(k, f"{k}_norm"), v
        return self.head_norm(q, self.c.n_head), self.head_norm(k, self.c.n_kv_head), v

    def head_norm(self, x: str, n_head: int) -> str:
        """[B, T, n_head * head_dim], each head normalised."""
        g = self.g
        heads = g.op("Reshape", x, g.constant(f"heads_{n_head}", [0, 0, n_head, self.c.head_dim]), name=f"{x}.heads")
        normed = self.norm(heads, f"{x}_norm")
        return g.op("Reshape", normed, g.constant("flat_heads", [0, 0, -1]), name=f"{x}.flat")

    @cached_property
    def lengths(self) -> tuple[str, str]:
        """Per sequence, its tokens less one, int32 [B]; and the longest of them, an int32 scalar."""
        g = self.g
        count = g.op("ReduceSum", ATTENTION_MASK, g.constant("time_axis", [1]), name="lengths.sum", keepdims=0)
        less = g.op("Sub", count, g.constant("one", [1]), name="lengths.less_one")
        total = g.op(
            "Gather",
            g.op("Shape", ATTENTION_MASK, name="longest.shape"),
            g.constant("index_1", 1),
            name="longest.total",
        )
        to_int32: dict[str, Any] = {"to": onnx.TensorProto.INT32}
        return g.op("Cast", less, name="lengths", **to_int32), g.op("Cast", total, name="longest", **to_int32)

    def attention_options(self, i: int) -> dict[str, Any]:
        """Attributes of layer i's attention where they are not the operator's defaults."""
        c = self.c
        options = {"local_window_size": c.window(i), "scale": c.attn_scale, "softcap": c.attn_softcap}
        return {name: value for name, value in options.items() if value}

    def rotary_tables(self, c: ModelConfig) -> tuple[str, str]:
        """cos and sin of position x frequency, [context_length, rope_dim / 2]; onnxruntime folds them when it loads."""
        g, name = self.g, "rope" if c is self.c else "rope.local"
        bounds = {"start": 0.0, "end": self.c.context_length, "step": 1.0}
        limits = [g.constant(f"rope.{bound}", value, np.float32) for bound, value in bounds.items()]
        positions = g.once("Range", *limits, name="rope.positions")
        column = g.once("Unsqueeze", positions, g.constant("rope.axis", [1]), name="rope.column")
        frequencies = spread_frequencies(c, rope_frequencies(c)) if self.spread else rope_frequencies(c)
        row = g.constant(f"{name}.frequencies", frequencies, np.float32)
        angles = g.once("Mul", column, row, name=f"{name}.angles")
        if c.rope_attention_factor == 1.0:
            return g.once("Cos", angles, name=f"{name}.cos"), g.once("Sin", angles, name=f"{name}.sin")
        scale = g.constant(f"{name}.scale", rotary_scale(c, self.spread), np.float32)
        cos, sin = (g.once(kind, angles, name=f"{name}.{kind.lower()}.unscaled") for kind in ("Cos", "Sin"))
        return g.once("Mul", cos, scale, name=f"{name}.cos"), g.once("Mul", sin, scale, name=f"{name}.sin")


def _halved(name: str, array: FloatArray) -> npt.NDArray[np.float16]:
    """A weight as float16. Raises UnsupportedModelError when that has no room for its numbers."""
    largest = max(array.max(), -array.min())
    if largest > np.finfo(np.float16).max:
        raise UnsupportedModelError(
            f"{name} holds {largest:g}, and float16 ends at {np.finfo(np.float16).max:g}; export it as fp32"
        )
    return array.astype(np.float16)
