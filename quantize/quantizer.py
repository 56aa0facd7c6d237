"""Quantizing: a float bundle in, a smaller bundle out. Weights are read, rounded and written one at a time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from gptedge.bundle import GRAPH, GRAPH_DATA, MANIFEST, Bundle, open_bundle, verify, write_manifest
from gptedge.errors import BundleError, UsageError
from gptedge.files import check_destination, new_folder
from gptedge.measure import peak_rss_mb
from gptedge.onnx_file import WeightFile, load_graph, read_initializer, save_graph
from gptedge.quantize.passes import Target, find_targets, rewrite
from gptedge.quantize.recipes import RECIPES
from gptedge.quantize.rounding import Blocks, quantize_rows
from gptedge.runtime.onnx_runtime import default_threads

Report = Callable[[int, int, str], None]
FLOAT_RECIPES = ("fp32", "fp16")
_CHUNK_VALUES = 1 << 19  # weights rounded at once by a thread; larger chunks fall out of the processor's cache


@dataclass(frozen=True)
class QuantizeResult:
    bundle: Path
    recipe: str
    size_mb: float
    seconds: float
    peak_rss_mb: float


def quantize(
    source: Path,
    out: Path,
    *,
    recipe: str,
    force: bool = False,
    threads: int | None = None,
    report: Report = lambda done, total, note: None,
) -> QuantizeResult:
    """Write `out` from the float bundle `source` with one of RECIPES.

    Raises UsageError for an unknown recipe or a bundle that is quantized already, BundleError for a broken one.
    """
    start = time.perf_counter()
    if recipe not in RECIPES:
        raise UsageError(f"recipe {recipe!r} is not known; known are {', '.join(RECIPES)}")
    bundle = open_bundle(Path(source))
    _check_source(bundle)
    check_destination(out, force=force)
    verify(bundle)
    assert bundle.manifest is not None
    with new_folder(Path(out), force=force) as folder:
        for name in bundle.manifest["files"]:
            if name not in (GRAPH, GRAPH_DATA, MANIFEST):
                shutil.copyfile(bundle.path / name, folder / name)
        _write_graph(bundle, folder, recipe, threads or default_threads(), report)
        write_manifest(folder, family=bundle.manifest["family"], recipe=recipe, packages=("onnx",))
        size = open_bundle(folder).size_bytes
    return QuantizeResult(
        bundle=Path(out),
        recipe=recipe,
        size_mb=round(size / 1e6, 2),
        seconds=round(time.perf_counter() - start, 2),
        peak_rss_mb=peak_rss_mb(),
    )


def _check_source(bundle: Bundle) -> None:
    if bundle.manifest is None:
        raise BundleError(f"{bundle.path} has no {MANIFEST}; quantize takes bundles that gptedge export made")
    if bundle.recipe not in FLOAT_RECIPES:
        raise UsageError(
            f"{bundle.path} is quantized already ({bundle.recipe}); quantize the fp32 bundle it was made from"
        )


def _write_graph(bundle: Bundle, folder: Path, recipe: str, threads: int, report: Report) -> None:
    model = load_graph(bundle.path / GRAPH)
    targets = find_targets(model, RECIPES[recipe])
    initializers = {t.name: t for t in model.graph.initializer}
    importance = _Importance(model, initializers, bundle.path)
    total, done = sum(t.rows * t.width for t in targets), 0
    with WeightFile(folder / GRAPH_DATA) as file, ThreadPoolExecutor(threads) as pool:

        def store(target: Target) -> dict[str, TensorProto]:
            nonlocal done
            rows = read_initializer(initializers[target.weight], bundle.path)
            blocks = _quantize(rows, target, importance.of(target), pool)
            done += rows.size
            report(done, total, "weights")
            return _initializers(file, target.weight, blocks)

        def keep(tensor: TensorProto) -> TensorProto:
            if tensor.data_location != TensorProto.EXTERNAL:
                return tensor
            return file.add(tensor.name, [read_initializer(tensor, bundle.path)])

        rewrite(model, targets, store, keep)
    save_graph(folder / GRAPH, model)


def _quantize(
    rows: npt.NDArray[np.float32], target: Target, importance: npt.NDArray[np.float32] | None, pool: ThreadPoolExecutor
) -> Blocks:
    """Chunks of rows in parallel: numpy releases the interpreter's lock."""
    step = max(1, _CHUNK_VALUES // target.width)
    chunks = [rows[i : i + step] for i in range(0, len(rows), step)]
    parts = list(pool.map(lambda c: quantize_rows(np.asarray(c, np.float32), target.scheme, importance), chunks))
    zero_points = [p.zero_points for p in parts if p.zero_points is not None]
    return Blocks(
        np.concatenate([p.packed for p in parts]),
        np.concatenate([p.scales for p in parts]),
        np.concatenate(zero_points) if zero_points else None,
    )


def _initializers(file: WeightFile, name: str, blocks: Blocks) -> dict[str, TensorProto]:
    made = {
        "packed": file.add(f"{name}.packed", [blocks.packed]),
        "scales": file.add(f"{name}.scales", [blocks.scales]),
    }
    if blocks.zero_points is not None:
        made["zero_points"] = file.add(f"{name}.zero_points", [blocks.zero_points])
    return made


class _Importance:
    """What the graph itself tells of a product's inputs: after a norm, a column's size follows the norm's gain."""

    _NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")

    def __init__(self, model: onnx.ModelProto, initializers: dict[str, TensorProto], folder: Path) -> None:
        gains = {}
        for node in model.graph.node:
            if node.op_type in self._NORMS:
                gains[node.output[0]] = node.input[1 if node.op_type == self._NORMS[0] else 2]
        self._gain_of = {
            node.name: gains[node.input[0]] for node in model.graph.node if node.input and node.input[0] in gains
        }
        self._initializers = initializers
        self._folder = folder

    def of(self, target: Target) -> npt.NDArray[np.float32] | None:
        """Squared gain of each input column, [width]; None where the graph does not tell."""
        gain = next((self._gain_of[p] for p in target.products if p in self._gain_of), None)
        if gain is None or target.lookups:
            return None
        values = np.asarray(read_initializer(self._initializers[gain], self._folder), np.float32)
        return np.square(values) if values.shape == (target.width,) else None
