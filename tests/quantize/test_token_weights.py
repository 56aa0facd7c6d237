"""Tokens that the model's answer hangs on count more, and GPTQ learns from them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptedge.bundle import GRAPH
from gptedge.checkpoint import open_checkpoint
from gptedge.onnx_file import load_graph, read_initializer
from gptedge.progress import silent
from gptedge.quantize.calibrated import Calibrator
from gptedge.quantize.passes import find_targets
from gptedge.quantize.quantizer import quantize
from gptedge.quantize.recipes import Group, Recipe, Scheme
from gptedge.quantize.rounding import dequantize
from gptedge.quantize.token_weights import token_weights
from gptedge.quantize.walk import Read
from gptedge.train.model import GPT
from tests.conftest import TEXT

SCHEME = Scheme(bits=4, block_size=32, symmetric=False, steps=6)
DOWN = [f"blocks.{i}.mlp.down" for i in range(3)]


@pytest.fixture
def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (6, 40))


@pytest.fixture
def graph(tiny_bundle: Path) -> tuple[onnx.ModelProto, Read]:
    return load_graph(tiny_bundle / GRAPH), partial(read_initializer, folder=tiny_bundle)


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def gradients_by_hooks(checkpoint: Path, windows: np.ndarray) -> dict[str, np.ndarray]:
    """The same from the model that trains: lengths of the gradients at the outputs of down projections, [n, T]."""
    model, lengths = GPT.from_checkpoint(open_checkpoint(checkpoint)), {name: list[Tensor]() for name in DOWN}

    def watch(name: str, output: Tensor) -> None:
        output.register_hook(lambda gradient: lengths[name].append(gradient[0].norm(dim=-1)))

    downs = [m for n, m in model.named_modules() if n.endswith(".down")]
    for name, module in zip(DOWN, downs, strict=True):
        assert isinstance(module, nn.Linear)
        module.register_forward_hook(lambda _module, _inputs, output, name=name: watch(name, output))
    generator = torch.Generator().manual_seed(0)
    for ids in windows:
        log_p = F.log_softmax(model(torch.from_numpy(ids[None]))[0], -1)
        answers = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, answers).sum().backward()
    return {name: torch.stack(rows).numpy() for name, rows in lengths.items()}


def test_lengths_of_gradients_one_on_average(
    graph: tuple[onnx.ModelProto, Read], tiny_checkpoint: Path, windows: np.ndarray
) -> None:
    found = token_weights(*graph, windows, DOWN, seed=0, threads=1, report=silent)
    for name, lengths in gradients_by_hooks(tiny_checkpoint, windows).items():
        np.testing.assert_allclose(found[name], lengths / lengths.mean(), rtol=1e-3)
    assert all(np.std(rows) > 0.05 for rows in found.values())


def test_the_first_product_of_all_has_weights_too(graph: tuple[onnx.ModelProto, Read], windows: np.ndarray) -> None:
    """Where nothing that learns comes before it, as the gains of a bundle in float16."""
    model, read = graph
    first = next(node.name for node in model.graph.node if node.op_type == "FusedMatMul")
    (found,) = token_weights(model, read, windows, [first], seed=0, threads=1, report=silent).values()
    assert found.mean() == pytest.approx(1, rel=1e-5)


def test_tokens_that_count_nothing_teach_nothing(
    graph: tuple[onnx.ModelProto, Read], windows: np.ndarray, pool: Executor
) -> None:
    """Five windows of six, over two batches of a walk, weigh nothing: what is left is the sixth's."""
    model, read = graph
    rows = {t.name: t for t in model.graph.initializer}
    target = find_targets(model, Recipe("", (Group("*.down.weight", SCHEME, "gptq"),)))[0]

    def rounded(windows: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
        calibrator = Calibrator(model, read, windows, token_weights=weights, threads=1, pool=pool)
        blocks = calibrator.quantize(target, read(rows[target.weight]))
        return dequantize(blocks, SCHEME, target.width)

    last_alone = np.zeros(windows.shape, np.float32)
    last_alone[-1] = 1
    weighed = rounded(windows, dict.fromkeys(target.products, last_alone))
    alone, alike = rounded(windows[-1:], {}), rounded(windows, {})
    assert np.mean(np.abs(weighed - alone) > 1e-6) < 0.01
    assert np.mean(np.abs(alike - alone) > 1e-6) > 0.1


def test_the_first_token_of_a_window_counts_as_often_as_the_recipe_says(
    graph: tuple[onnx.ModelProto, Read], windows: np.ndarray, pool: Executor
) -> None:
    model, read = graph
    rows = {t.name: t for t in model.graph.initializer}

    def rounded(weights: dict[str, np.ndarray], **options: int) -> np.ndarray:
        group = Group("*.attn.qkv.weight", SCHEME, "gptq", **options)
        target = find_targets(model, Recipe("", (group,)))[0]
        calibrator = Calibrator(model, read, windows, token_weights=weights, threads=1, pool=pool)
        return dequantize(calibrator.quantize(target, read(rows[target.weight])), SCHEME, target.width)

    thirty = np.ones(windows.shape, np.float32)
    thirty[:, 0] = 30
    wanted, alike = rounded({"blocks.0.attn.qkv": thirty}), rounded({})
    assert np.array_equal(rounded({}, first_token=30), wanted)
    assert not np.array_equal(alike, wanted)
    assert np.array_equal(rounded({}, first_token=1), alike)


def test_a_recipe_may_weigh_tokens(tiny_bundle: Path, tmp_path: Path) -> None:
    group = '[[group]]\nmatch = "*.down.weight"\nbits = 4\nblock_size = 32\nmethod = "gptq"\n'
    words = np.array(TEXT.split())
    (tmp_path / "text.txt").write_text(" ".join(np.random.default_rng(0).choice(words, 3 * len(words))))
    made = {}
    for name, first in {"alike": "", "weighed": "weigh_tokens = true\n", "one": "calibration_windows = 1\n"}.items():
        (tmp_path / f"{name}.toml").write_text(first + group)
        recipe, text = str(tmp_path / f"{name}.toml"), tmp_path / "text.txt"
        made[name] = quantize(tiny_bundle, tmp_path / name, recipe=recipe, calibration=text, threads=1).bundle
    data = {name: (bundle / "model.onnx.data").read_bytes() for name, bundle in made.items()}
    assert len(set(data.values())) == 3
    assert len({len(content) for content in data.values()}) == 1
