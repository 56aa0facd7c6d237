"""A quantized decoder graph as a PyTorch module, to train what it holds: the nodes of the bundle, run by autograd.

It computes whole texts from an empty cache, in float32; the 8-bit rounding of activations inside MatMulNBits is left
out. Every operator that `export` writes and `passes` puts in its place is a row of a table, so no family is known here.

Shapes: B batch, T tokens, H query heads, K key/value heads, D head_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import NodeProto
from torch import Tensor, nn

from gptedge.errors import UnsupportedModelError
from gptedge.graph_io import INPUT_IDS, LOGITS, POSITION_IDS
from gptedge.quantize.recipes import Scheme
from gptedge.quantize.rounding import ROLES, TOP_PART, Blocks, dequantize, unpack
from gptedge.quantize.walk import Read
from gptedge.train.model import attend

_NORMS = {  # where a norm's gain stands among its inputs
    "SimplifiedLayerNormalization": 1,
    "SkipSimplifiedLayerNormalization": 2,
    "LayerNormalization": 1,
    "SkipLayerNormalization": 2,
}
_QUANTIZED = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
"""Which input holds the integers."""


class Matrix(nn.Module):
    """A 4-bit weight [N, K] that learns: integers, straight through, and scales; zero points stay.

    `latent` [N, blocks, block_size] is in steps of the grid and is rounded to integers; `change` [N, blocks, 1] is by
    what part of it a scale has moved, so that one learning rate suits all blocks. Scales are rounded to parts of their
    rows' units, which stay.
    """

    def __init__(self, blocks: Blocks, scheme: Scheme, width: int) -> None:
        super().__init__()
        integers = unpack(blocks.packed, scheme.bits).astype(np.float32)
        assert blocks.zero_points is not None
        assert blocks.units is not None
        zero = unpack(blocks.zero_points, scheme.bits)[:, : integers.shape[1]].astype(np.float32)
        self.scheme, self.width, self.top = scheme, width, 2**scheme.bits - 1
        self.latent = nn.Parameter(torch.from_numpy(integers))
        self.first_scale = torch.from_numpy(blocks.float_scales())[..., None]
        self.units = torch.from_numpy(blocks.units.astype(np.float32))[..., None]
        self.change = nn.Parameter(torch.zeros_like(self.first_scale))
        self.zero = torch.from_numpy(zero)[..., None]

    def forward(self) -> Tensor:
        return _on_grid(self.latent, self._scale(), self.units, self.zero, self.top)[:, : self.width]

    @torch.no_grad()
    def rounded(self) -> tuple[Any, Any, Any]:
        """Integers [N, K], scales and zero points [N, blocks], as `rounding.as_blocks` takes them."""
        integers = self.latent.round().clamp(0, self.top).view(len(self.latent), -1)[:, : self.width]
        scale = _stored(self._scale(), self.units)
        return integers.numpy(), scale[..., 0].numpy(), self.zero[..., 0].numpy()

    def _scale(self) -> Tensor:
        """Before it is rounded, [N, blocks, 1]."""
        return self.first_scale * (1 + self.change)


class Gain(nn.Module):
    """A norm's gain [C], which learns by parts of itself: some channels' are a thousandth of others'."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.first = first
        self.part = nn.Parameter(torch.zeros_like(first))

    def forward(self) -> Tensor:
        return self.first * (1 + self.part)


def _stored(scale: Tensor, units: Tensor) -> Tensor:
    """As `rounding.storable` has it."""
    return (scale / units).round_().clamp_(1, TOP_PART).mul_(units)


class _Grid(torch.autograd.Function):
    """A weight of rounded integers and scales, straight through."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, units: Tensor, zero: Tensor, top: int) -> Tensor:
        steps, scale = latent.round().clamp_(0, top).sub_(zero), _stored(scale, units)
        ctx.save_for_backward(steps, scale)
        return (steps * scale).view(len(latent), -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        steps, scale = ctx.saved_tensors
        g = gradients[0].view(steps.shape)
        return g * scale, (g * steps).sum(-1, keepdim=True), None, None, None


_on_grid: Callable[..., Tensor] = _Grid.apply  # which torch leaves untyped


class TorchGraph(nn.Module):
    """The graph `model`, whose initializers `read` gives. Parameters: its 4-bit matrices, and its norms' gains."""

    def __init__(self, model: onnx.ModelProto, read: Read) -> None:
        """Raises UnsupportedModelError for an operator that is not in the table."""
        super().__init__()
        self._initializers = {t.name: t for t in model.graph.initializer}
        self._read = read
        self._nodes = _needed(model)
        self.matrices = nn.ModuleDict()
        self.gains = nn.ModuleDict()
        self._fixed: dict[str, Tensor] = {}
        for node in self._nodes:
            self._load(node)
        self._fold()

    def forward(self, ids: Tensor, watch: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Logits [B, T, V] of ids [B, T]; `watch` is shown each node's name and first output."""
        values: dict[str, Tensor] = {**self._fixed, INPUT_IDS: ids}
        values[POSITION_IDS] = torch.arange(ids.shape[1]).expand_as(ids)
        values |= {name: gain() for name, gain in self.named_gains().items()}
        for node in self._nodes:
            self._run(node, values)
            if watch is not None:
                watch(node.name, values[node.output[0]])
        return values[LOGITS]

    def named_matrices(self) -> Mapping[str, Matrix]:
        """By the weight's name."""
        return {_name(key): m for key, m in self.matrices.items() if isinstance(m, Matrix)}

    def named_gains(self) -> Mapping[str, Gain]:
        """By the initializer's name."""
        return {_name(key): g for key, g in self.gains.items() if isinstance(g, Gain)}

    def _run(self, node: NodeProto, values: dict[str, Tensor]) -> None:
        inputs = [values.get(i) if i else None for i in node.input]
        if node.op_type == "MatMulNBits":
            key = _key(node.input[1])
            width = _attributes(node)["K"]
            weight = self.matrices[key]() if key in self.matrices else values[node.input[1]][:, :width]
            made: tuple[Tensor, ...] = (F.linear(values[node.input[0]], weight),)
        elif node.op_type == "GatherBlockQuantized":
            made = (F.embedding(values[node.input[1]], values[node.input[0]]),)
        else:
            made = _OPERATORS[node.op_type](_attributes(node), *inputs)
        values.update((name, value) for name, value in zip(node.output, made, strict=False) if name)

    def _load(self, node: NodeProto) -> None:
        """Take in the initializers that a node reads."""
        if node.op_type in _QUANTIZED:
            self._load_quantized(node)
            return
        if node.op_type not in _OPERATORS:
            raise UnsupportedModelError(f"{node.name} cannot be trained: its operator is {node.op_type}")
        for at, name in enumerate(node.input):
            if name in self._initializers:
                value = torch.from_numpy(self._array(name))
                if at == _NORMS.get(node.op_type):
                    self.gains[_key(name)] = Gain(value.float())
                else:
                    self._fixed[name] = value

    def _load_quantized(self, node: NodeProto) -> None:
        packed = node.input[_QUANTIZED[node.op_type]]
        weight, a = packed.removesuffix(".packed"), _attributes(node)
        blocks = Blocks.of({role: self._array(f"{weight}.{role}") for role in ROLES})
        scheme = Scheme(bits=a["bits"], block_size=a["block_size"], symmetric=blocks.zero_points is None, steps=1)
        if scheme.bits == 4 and not scheme.symmetric:
            self.matrices[_key(packed)] = Matrix(blocks, scheme, a["K"])
        elif packed not in self._fixed:  # a table that is looked up and is the head too
            width = blocks.scales.shape[1] * scheme.block_size
            self._fixed[packed] = torch.from_numpy(dequantize(blocks, scheme, width))

    def _fold(self) -> None:
        """Compute now what does not depend on the tokens or on parameters."""
        with torch.no_grad():
            known = [n for n in self._nodes if n.op_type in _OPERATORS and n.op_type != "GroupQueryAttention"]
            for node in known:
                if all(i in self._fixed for i in node.input if i):
                    self._run(node, self._fixed)
            self._nodes = [n for n in self._nodes if n.output[0] not in self._fixed]

    def _array(self, name: str) -> Any:
        """None without such an initializer."""
        return np.array(self._read(self._initializers[name])) if name in self._initializers else None


def _key(name: str) -> str:
    """Names of modules hold no dots."""
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".").removesuffix(".packed")


def _needed(model: onnx.ModelProto) -> list[NodeProto]:
    """The nodes that logits come from; a text that starts from an empty cache needs no lengths and no past."""
    makers = {o: i for i, node in enumerate(model.graph.node) for o in node.output if o}
    found: set[int] = set()
    stack = [LOGITS]
    while stack:
        i = makers.get(stack.pop())
        if i is None or i in found:
            continue
        found.add(i)
        node = model.graph.node[i]
        skipped = range(3, 7) if node.op_type == "GroupQueryAttention" else ()
        if node.op_type in _QUANTIZED:  # what it reads besides activations or ids is loaded in one
            stack.append(node.input[1 - _QUANTIZED[node.op_type]])
            continue
        stack += [name for at, name in enumerate(node.input) if at not in skipped and name]
    return [model.graph.node[i] for i in sorted(found)]


# ---- operators: (attributes, inputs…) -> outputs ---------------------------------------------------------------------


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _rms(a: Mapping[str, Any], x: Tensor, gain: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (F.rms_norm(x, gain.shape, gain, a["epsilon"]),)


def _skip_rms(a: Mapping[str, Any], x: Tensor, update: Tensor, gain: Tensor, *_: Any) -> tuple[Any, ...]:
    total = x + update
    return (*_rms(a, total, gain), None, None, total)


def _layer_norm(a: Mapping[str, Any], x: Tensor, gain: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    return (F.layer_norm(x, gain.shape, gain, bias, a["epsilon"]),)


def _skip_layer_norm(
    a: Mapping[str, Any], x: Tensor, update: Tensor, gain: Tensor, bias: Tensor | None = None, *_: Any
) -> tuple[Any, ...]:
    total = x + update
    return (*_layer_norm(a, total, gain, bias), None, None, total)


def _attention(a: Mapping[str, Any], q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any) -> tuple[Tensor]:
    """GroupQueryAttention of a whole text, from heads side by side [B, T, heads * D] to the same."""
    heads, kv_heads = a["num_heads"], a["kv_num_heads"]
    if k is None or v is None:
        size = q.shape[-1] // (heads + 2 * kv_heads)
        q, k, v = torch.split(q, [heads * size, kv_heads * size, kv_heads * size], -1)
    parts = [x.view(*x.shape[:2], n, -1).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))]
    if a.get("do_rotary"):
        cos, sin = rest[4:6]
        parts[:2] = [_rotated(x, cos[: x.shape[2]], sin[: x.shape[2]]) for x in parts[:2]]
    window = max(0, a.get("local_window_size", 0))
    y = attend(*parts, window=window, scale=a.get("scale") or None, softcap=a.get("softcap") or None)
    return (y.transpose(1, 2).flatten(2),)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    x1, x2, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), -1)


def _split(a: Mapping[str, Any], x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    return torch.split(x, x.shape[a["axis"]] // a["num_outputs"] if sizes is None else sizes.tolist(), a["axis"])


def _slice(_: Any, x: Tensor, start: Tensor, end: Tensor, axis: Tensor) -> tuple[Tensor]:
    return (x.movedim(int(axis), 0)[int(start) : int(end)].movedim(0, int(axis)),)


def _reshape(_: Any, x: Tensor, shape: Tensor) -> tuple[Tensor]:
    """0 in a shape keeps the dimension."""
    return (x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())]),)


def _cast(a: Mapping[str, Any], x: Tensor) -> tuple[Tensor]:
    return (torch.from_numpy(x.numpy().astype(onnx.helper.tensor_dtype_to_np_dtype(a["to"]))),)


def _gelu(a: Mapping[str, Any], x: Tensor) -> tuple[Tensor]:
    return (F.gelu(x, approximate=a["approximate"].decode()),)


_Operator = Callable[..., tuple[Any, ...]]
_OPERATORS: Mapping[str, _Operator] = {
    "SimplifiedLayerNormalization": _rms,
    "SkipSimplifiedLayerNormalization": _skip_rms,
    "LayerNormalization": _layer_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "GroupQueryAttention": _attention,
    "Split": _split,
    "Slice": _slice,
    "Reshape": _reshape,
    "Cast": _cast,
    "Gelu": _gelu,
    "QuickGelu": lambda a, x: (x * torch.sigmoid(a["alpha"] * x),),
    "FusedMatMul": lambda a, x, w: (x @ w.transpose(-1, -2) if a.get("transB") else x @ w,),
    "Gather": lambda a, x, i: (F.embedding(i, x),),
    "Add": lambda a, x, y: (x + y,),
    "Mul": lambda a, x, y: (x * y,),
    "Div": lambda a, x, y: (x / y,),
    "Relu": lambda a, x: (F.relu(x),),
    "Tanh": lambda a, x: (torch.tanh(x),),
    "Cos": lambda a, x: (torch.cos(x),),
    "Sin": lambda a, x: (torch.sin(x),),
    "Sub": lambda a, x, y: (x - y,),
    "Clip": lambda a, x, low, high: (torch.clamp(x, low, high),),
    "GreaterOrEqual": lambda a, x, y: (x >= y,),
    "Where": lambda a, condition, x, y: (torch.where(condition, x, y),),
    "Concat": lambda a, *parts: (torch.cat(parts, a["axis"]),),
    "Range": lambda a, start, end, step: (torch.arange(float(start), float(end), float(step)),),
    "Unsqueeze": lambda a, x, axis: (x.unsqueeze(int(axis)),),
}
