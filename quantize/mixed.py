"""Choosing bits and block size of each weight so that a bundle has a given size and loses least.

What rounding a group of weights costs is measured, not guessed: the divergence of the model's predictions when one
layer, one kind of weight, or the table is at 4 bits and all else is float. Divergences of independent roundings add,
and grow with the squared error of a product's outputs, so a weight's cost under any scheme is its layer's share times
its kind's share, times the scheme's own error over the probe's: measured too, on some rows that are rounded as the
scheme would round all of them. Then bytes are spent where they save most divergence each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from gptedge.evaluate.divergence import log_softmax
from gptedge.progress import Report
from gptedge.quantize.calibrated import weights_of
from gptedge.quantize.gptq import Order, damped, round_rows
from gptedge.quantize.passes import Target, plain_name
from gptedge.quantize.recipes import Group, Recipe, Scheme
from gptedge.quantize.rounding import Blocks, dequantize, quantize_matrix
from gptedge.quantize.split_table import table_of
from gptedge.quantize.walk import Read, Walk

FloatArray = npt.NDArray[np.float32]

WINDOWS, WINDOW = 4, 128
"""Text that costs are measured on; the second half of each window is scored."""
ERROR_WINDOWS = 8
"""Whole windows of the text, from which a weight's own errors are found: its inputs' moments need more tokens."""
_ROWS = 64  # of a weight, whose errors stand for all of it
_EVERY = 8  # token of the text, whose rounding stands for that of all; the first of each window is among them
_PROBE_STEPS = 4
_UNSEEN = 1.2
"""What the head costs on other text than it was calibrated on, over what is measured on that: 1.13 to 1.25. Layers,
whose errors later ones make up for, stay below what is measured."""


def _schemes(bits: int, *block_sizes: int, symmetric: bool = True) -> tuple[Scheme, ...]:
    return tuple(Scheme(bits, size, symmetric, steps=12 if bits == 4 else 1) for size in block_sizes)


SCHEMES = _schemes(4, 32, 128, 64, 16, symmetric=False) + _schemes(4, 128, 64, 32) + _schemes(8, 128, 64, 32)
TABLE_SCHEMES = _schemes(4, 32, 16) + _schemes(8, 128, 64, 32)
"""What can be chosen; the first is the one that costs are measured with."""


@dataclass(frozen=True)
class Choice:
    scheme: Scheme
    size: int
    """Bytes."""
    cost: float
    """Expected divergence, in nats a token."""


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """The smallest choice of each weight, and then the upgrades that save most divergence a byte until bytes run out.

    For the largest weight every choice is tried: a table may be a third of a model, and its next step too large for
    what others have left. `budget` holds at least the smallest choices.
    """
    hulls = {name: _hull(row) for name, row in choices.items()}
    largest = max(hulls, key=lambda name: hulls[name][-1].size)
    others = sum(h[0].size for h in hulls.values()) - hulls[largest][0].size
    plans = [_upgraded({**hulls, largest: [c]}, budget) for c in hulls[largest] if others + c.size <= budget]
    return min(plans, key=lambda chosen: sum(c.cost for c in chosen.values()))


def _upgraded(hulls: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    level = dict.fromkeys(hulls, 0)
    left = budget - sum(h[0].size for h in hulls.values())
    steps = sorted(
        ((a.cost - b.cost) / (b.size - a.size), name, i)
        for name, hull in hulls.items()
        for i, (a, b) in enumerate(itertools.pairwise(hull))
    )
    for _, name, i in reversed(steps):
        extra = hulls[name][i + 1].size - hulls[name][i].size
        if level[name] == i and extra <= left:
            level[name], left = i + 1, left - extra
    return {name: hulls[name][i] for name, i in level.items()}


def _hull(row: Sequence[Choice]) -> list[Choice]:
    """Choices that are worth their bytes: from each to the next, a byte saves less than before."""
    hull: list[Choice] = []
    for choice in sorted(row, key=lambda c: (c.size, c.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(a: Choice, b: Choice) -> float:
    return (a.cost - b.cost) / (b.size - a.size)


def smallest(targets: Iterable[Target]) -> int:
    """The fewest bytes that all of `targets` can take."""
    return sum(min(_size(t, s) for s in _candidates(t)) for t in targets)


@dataclass(frozen=True)
class Subject:
    """A float graph, whose weights `targets` are to be rounded, and what it is run with."""

    model: onnx.ModelProto
    read: Read
    targets: Sequence[Target]
    threads: int
    pool: Executor

    @cached_property
    def products(self) -> Mapping[str, Target]:
        """By name of each product's node, in the graph's order, whose weight it takes."""
        targets = {product: t for t in self.targets for product in t.products}
        return {node.name: targets[node.name] for node in self.model.graph.node if node.name in targets}

    @cached_property
    def _initializers(self) -> Mapping[str, TensorProto]:
        return {t.name: t for t in self.model.graph.initializer}

    def weight(self, target: Target, read: Read | None = None) -> FloatArray:
        """[rows, width], as `read` gives it."""
        return np.asarray((read or self.read)(self._initializers[target.weight]), np.float32)

    def walk(self, windows: npt.NDArray[np.int64], read: Read | None = None) -> Walk:
        return Walk(self.model, read or self.read, windows, threads=self.threads)


def plan(subject: Subject, windows: npt.NDArray[np.int64], budget: int, report: Report) -> Recipe:
    """A group for each target, so that all of them together take at most `budget` bytes: `smallest` or more."""
    roundings = Roundings(subject, windows[:ERROR_WINDOWS], report)
    probe = Probe(subject, windows[:WINDOWS, :WINDOW], roundings.probes)
    targets, units = subject.targets, _units(subject.targets)
    costs: dict[str, float] = {}
    for i, (unit, members) in enumerate(units.items()):
        is_head = all(t in probe.heads for t in members)
        costs[unit] = probe.divergence(members) * (_UNSEEN if is_head else 1.0)
        report(i + 1, len(units), "measuring what 4 bits cost")
    choices = {t.weight: roundings.choices(t, _cost(t, targets, costs)) for t in targets}
    chosen = allocate(choices, budget)
    return Recipe("bits and blocks chosen for a size", tuple(_group(t, chosen[t.weight].scheme) for t in targets))


def _group(target: Target, scheme: Scheme) -> Group:
    rtn = bool(target.lookups) and (scheme.bits == 8 or not target.products)
    method = "rtn" if rtn else "gptq"  # of 8 bits too: it makes up for what earlier weights lost
    return replace(target.group, match=_name(target), scheme=scheme, method=method, smooth=scheme.bits == 8)


def _name(target: Target) -> str:
    return plain_name(target.weight)


def _place(target: Target) -> tuple[str, str]:
    """Layer and kind of a weight within the blocks; its own name, twice, outside of them."""
    parts = _name(target).split(".")
    if parts[0] != "blocks":
        return _name(target), _name(target)
    return f"layer {parts[1]}", ".".join(parts[2:])


def _units(targets: Iterable[Target]) -> dict[str, list[Target]]:
    """What is rounded together to be measured: each layer, and each kind of weight."""
    units: dict[str, list[Target]] = {}
    for target in targets:
        for unit in dict.fromkeys(_place(target)):
            units.setdefault(unit, []).append(target)
    return units


def _cost(target: Target, targets: Iterable[Target], costs: Mapping[str, float]) -> float:
    """Divergence that one weight at 4 bits costs: its layer's, shared among its kinds."""
    layer, kind = _place(target)
    if layer == kind:
        return costs[kind]
    kinds = {_place(t)[1] for t in targets if _place(t)[0] == layer}
    return costs[layer] * costs[kind] / max(sum(costs[k] for k in kinds), 1e-12)


class Roundings:
    """Every weight at 4 bits, and what its product's outputs lose on a text under every scheme that it could have."""

    def __init__(self, subject: Subject, windows: npt.NDArray[np.int64], report: Report) -> None:
        self._pool = subject.pool
        self._losses: dict[str, dict[Scheme, float]] = {}
        self.probes: dict[str, Blocks] = {}
        """Each weight under the first of its schemes."""
        walk = subject.walk(windows)
        for i, (product, target) in enumerate(subject.products.items()):
            weights = weights_of(target, windows.shape)
            inputs = np.concatenate(walk.inputs_of(product)) * np.sqrt(weights / weights.sum())
            self._measure(target, subject.weight(target), inputs)
            report(i + 1, len(subject.products), "measuring what each scheme changes")
        for target in subject.targets:
            if not target.products:  # a table of which a row is what comes out
                self._measure(target, subject.weight(target), np.eye(target.width, dtype=np.float32))

    def choices(self, target: Target, cost: float) -> list[Choice]:
        """Every scheme for a weight; `cost` is the divergence that the first costs."""
        return [Choice(s, _size(target, s), cost * loss) for s, loss in self._losses[target.weight].items()]

    def _measure(self, target: Target, weight: FloatArray, inputs: FloatArray) -> None:
        """`inputs` X [tokens, K] are weighed, so that X'X is the mean over tokens.

        A scheme's loss is the outputs' squared error, that of rounded activations included, over the probe's.
        """
        h = damped(inputs.T @ inputs)
        order = Order.of(h)

        def rounded(rows: FloatArray, scheme: Scheme) -> Blocks:
            if _group(target, scheme).method == "rtn":
                return quantize_matrix(rows, scheme, None, self._pool)
            return round_rows(rows, h, order, scheme, self._pool)

        def error(rows: FloatArray, scheme: Scheme) -> float:
            difference = rows - dequantize(rounded(rows, scheme), scheme, target.width)
            return float(np.vdot(difference @ h, difference))

        schemes = {s: replace(s, steps=min(s.steps, _PROBE_STEPS)) for s in _candidates(target)}
        probe = next(iter(schemes))
        self.probes[target.weight] = rounded(weight, schemes[probe])
        rows, some = weight[:: max(1, len(weight) // _ROWS)], inputs[::_EVERY]
        errors = {scheme: error(rows, quick) for scheme, quick in schemes.items()}
        activations = {size: _EVERY * _rounding_of(some, rows, size) for size in {s.block_size for s in schemes}}
        of_probe = max(errors[probe], 1e-30)
        self._losses[target.weight] = {s: (errors[s] + activations[s.block_size]) / of_probe for s in schemes}


class Probe:
    """Runs the float graph over a short text with some weights rounded."""

    def __init__(self, subject: Subject, windows: npt.NDArray[np.int64], rounded: Mapping[str, Blocks]) -> None:
        self._subject, self._windows, self.rounded = subject, windows, rounded
        head = table_of(list(subject.products.values())[-1].weight)
        parts = {name: t for name, t in subject.products.items() if table_of(t.weight) == head}
        self._last, self.heads = next(iter(parts)), list(parts.values())
        """The first product that makes logits, whose inputs are all others' too; the weights of all."""
        self._expected = self._log_probabilities(subject.read)

    def divergence(self, rounded: Iterable[Target]) -> float:
        """Mean Kullback-Leibler divergence, in nats a token, when these weights are at 4 bits."""
        names = {t.weight: t for t in rounded}

        def read(tensor: TensorProto) -> npt.NDArray[np.generic]:
            target, values = names.get(tensor.name), self._subject.read(tensor)
            if target is None:
                return values
            blocks = self.rounded[tensor.name]
            return dequantize(blocks, _candidates(target)[0], target.width).astype(values.dtype)

        got = self._log_probabilities(read)
        return float((np.exp(self._expected) * (self._expected - got)).sum(-1).mean())

    def _log_probabilities(self, read: Read) -> FloatArray:
        """[positions, vocab_size] of the second half of each window. The head's soft cap, if any, is left out."""
        walk, width = self._subject.walk(self._windows, read), self.heads[0].width
        hidden = np.concatenate(walk.inputs_of(self._last)).reshape(len(self._windows), -1, width)
        rows = hidden[:, hidden.shape[1] // 2 :].reshape(-1, width)
        return log_softmax(np.concatenate([rows @ self._subject.weight(t, read).T for t in self.heads], -1))


def _rounding_of(inputs: FloatArray, rows: FloatArray, block_size: int) -> float:
    """Squared error of the outputs by what MatMulNBits does to its inputs: 8 bits, a scale for each block."""
    n, k = inputs.shape
    blocks = np.pad(inputs, ((0, 0), (0, -k % block_size))).reshape(n, -1, block_size)
    scale = np.maximum(np.abs(blocks).max(-1, keepdims=True) / 127, np.finfo(np.float32).tiny)
    difference = (blocks - np.rint(blocks / scale) * scale).reshape(n, -1)[:, :k]
    return float(np.square(difference @ rows.T).sum())


def _candidates(target: Target) -> tuple[Scheme, ...]:
    return TABLE_SCHEMES if target.lookups else SCHEMES


def _size(target: Target, scheme: Scheme) -> int:
    """Bytes of a weight: integers, scales (see rounding.storable) and zero points."""
    blocks = -(-target.width // scheme.block_size)
    scales = 2 * blocks if scheme.bits == 8 else blocks + 2
    zero_points = 0 if scheme.symmetric else -(-blocks * scheme.bits // 8)
    return target.rows * (blocks * scheme.block_size * scheme.bits // 8 + scales + zero_points)
