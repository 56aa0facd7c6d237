"""Training with rounded weights: what was trained is what a quantized bundle holds, to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from gptedge.bundle import GRAPH
from gptedge.checkpoint import open_checkpoint, write_checkpoint
from gptedge.errors import UsageError
from gptedge.export.exporter import export
from gptedge.onnx_file import load_graph, read_initializer
from gptedge.quantize.passes import find_targets
from gptedge.quantize.quantizer import quantize
from gptedge.quantize.recipes import RECIPES
from gptedge.quantize.rounding import ROLES, Blocks, dequantize
from gptedge.train.model import GPT
from gptedge.train.qat import fake_quantize, refresh, rounded_weights
from gptedge.train.settings import QAT_RECIPES


@pytest.fixture
def model(tiny_checkpoint: Path) -> GPT:
    return GPT.from_checkpoint(open_checkpoint(tiny_checkpoint))


def ids_of(model: GPT) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 300, (2, 33)))


def train(model: GPT, steps: int) -> list[float]:
    ids = ids_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        with parametrize.cached():
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def bundle_weights(source: Path, bundle: Path, recipe: str) -> dict[str, np.ndarray]:
    """The matrices [N, K] that a quantized bundle's kernels compute with."""
    tensors = {t.name: t for t in load_graph(bundle / GRAPH).graph.initializer}

    def part(name: str) -> np.ndarray | None:
        return read_initializer(tensors[name], bundle) if name in tensors else None

    found = {}
    for target in find_targets(load_graph(source / GRAPH), RECIPES[recipe]):
        blocks = Blocks.of({role: part(f"{target.weight}.{role}") for role in ROLES})
        found[target.weight] = dequantize(blocks, target.scheme, target.width)
    return found


def joined(weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A bundle stacks matrices that read the same input."""
    for whole, parts in (("attn.qkv", ("attn.q", "attn.k", "attn.v")), ("mlp.gate_up", ("mlp.gate", "mlp.up"))):
        if whole in name:
            return np.concatenate([weights[name.replace(whole, part)] for part in parts])
    return weights[name]


@pytest.mark.parametrize("name", QAT_RECIPES)
def test_a_bundle_holds_what_was_trained(name: str, model: GPT, tiny_checkpoint: Path, tmp_path: Path) -> None:
    fake_quantize(model, name)
    losses = train(model, 5)
    assert losses[-1] < 0.9 * losses[0]
    trained = {k: v.numpy() for k, v in rounded_weights(model).items()}
    (tmp_path / "trained").mkdir()
    original = open_checkpoint(tiny_checkpoint)
    write_checkpoint(tmp_path / "trained", original.config, trained, original.side_files)
    source = export(tmp_path / "trained", tmp_path / "fp32").bundle
    recipe = QAT_RECIPES[name]
    made = bundle_weights(source, quantize(source, tmp_path / "small", recipe=recipe, threads=1).bundle, recipe)
    assert len(made) == 3 * 4 + 1
    for weight, values in made.items():
        np.testing.assert_array_equal(values, joined(trained, weight), err_msg=weight)


def test_rounding_starts_as_quantizing_rounds(model: GPT, tiny_bundle: Path, tmp_path: Path) -> None:
    """At 8 bits; at 4, quantizing evens out columns first, which what was trained needs no more."""
    fake_quantize(model, "int8")
    rounded = {k: v.numpy() for k, v in rounded_weights(model).items()}
    recipe = QAT_RECIPES["int8"]
    made = bundle_weights(tiny_bundle, quantize(tiny_bundle, tmp_path / "q", recipe=recipe).bundle, recipe)
    for weight, values in made.items():
        np.testing.assert_array_equal(values, joined(rounded, weight), err_msg=weight)


def test_gradients_reach_every_weight_and_names_stay(model: GPT) -> None:
    names = {name for name, _ in model.named_parameters()}
    fake_quantize(model, "int4")
    ids = ids_of(model)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert set(rounded_weights(model)) == names


def test_a_state_continues_a_run(model: GPT, tiny_checkpoint: Path) -> None:
    fake_quantize(model, "int4")
    train(model, 2)
    refresh(model)
    other = GPT.from_checkpoint(open_checkpoint(tiny_checkpoint))
    fake_quantize(other, "int4")
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, rounded_weights(other)[name]) for name, a in rounded_weights(model).items())


def test_scales_follow_weights_when_asked_to(model: GPT) -> None:
    fake_quantize(model, "int4")
    with torch.no_grad():
        for p in model.parameters():
            p *= 4
    before = rounded_weights(model)["embed.weight"].abs().max()
    refresh(model)
    assert rounded_weights(model)["embed.weight"].abs().max() > 3 * before


def test_unknown_and_twice_are_refused(model: GPT) -> None:
    with pytest.raises(UsageError, match="known are int4, int8"):
        fake_quantize(model, "int2")
    fake_quantize(model, "int8")
    with pytest.raises(UsageError, match="already"):
        fake_quantize(model, "int4")
