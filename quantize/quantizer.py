"""Quantizing: a float bundle in, a smaller bundle out. Weights are read, rounded and written one at a time."""

from __future__ import annotations

import copy
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from gptedge.bundle import (
    GRAPH,
    GRAPH_DATA,
    KV,
    LORA,
    MANIFEST,
    OUTPUT_ERRORS,
    PREFILL,
    PREFILL_FILES,
    Bundle,
    check_output,
    open_bundle,
    verify,
    write_manifest,
)
from gptedge.errors import BundleError, DataError, MissingExtraError, UsageError
from gptedge.files import new_file, new_folder, sha256
from gptedge.measure import peak_rss_mb
from gptedge.onnx_file import PAGE, WeightFile, load_graph, offset_of, read_initializer, save_graph
from gptedge.progress import Report, silent
from gptedge.quantize import calibration as calibration_text
from gptedge.quantize import integer_products, mixed, smooth
from gptedge.quantize import prefill as prompts
from gptedge.quantize.calibrated import Calibrator
from gptedge.quantize.calibration import Windows, own_windows, text_windows
from gptedge.quantize.equalize import equalize
from gptedge.quantize.integer_products import Columns
from gptedge.quantize.kv_cache import CACHES, quantize_cache
from gptedge.quantize.passes import Target, arrays_of, find_matrices, find_targets, rewrite
from gptedge.quantize.recipes import FLOAT_RECIPES, Recipe, find_recipe
from gptedge.quantize.rounding import Blocks, quantize_matrix
from gptedge.quantize.split_table import PARTS, split_tables
from gptedge.quantize.walk import Read, Walk
from gptedge.quantize.work import START, remove_work, work_folder
from gptedge.runtime.threads import checked_threads, default_threads

_KEPT = (LORA,)
"""What a manifest says of the float graph, and is true of the quantized one."""
Facts = dict[str, Any]
"""Entries of the manifest."""


@dataclass(frozen=True)
class QuantizeResult:
    bundle: Path
    recipe: str
    size_mb: float
    """10^6 bytes of the graph and its weights."""
    prefill_mb: float
    """Of the graph for prompts that `prefill` adds; 0 without one."""
    kv: str
    """What keys and values are kept as: float32 or int8."""
    kv_bytes_per_token: int | None
    """Of the KV cache of one text."""
    seconds: float
    peak_rss_mb: float


def quantize(
    source: Path,
    out: Path,
    *,
    recipe: str,
    target_mb: float | None = None,
    calibration: Path | None = None,
    prefill: str | None = None,
    kv: str | None = None,
    seed: int = 0,
    force: bool = False,
    threads: int | None = None,
    report: Report = silent,
) -> QuantizeResult:
    """Write `out` from the float bundle `source`; `recipe` is one of RECIPES, or a .toml file.

    `calibration` is text for recipes that learn from data; without one they use what the model writes itself, drawn
    with `seed`. `target_mb` (10^6 bytes of graph and weights) is what `mixed` fills, and no other recipe takes.
    `prefill` "int8" adds a graph of 8-bit products for prompts, in files of its own (see prefill.py), `kv` "int8" keeps
    keys and values in 8 bits (see kv_cache.py); both are calibrated too.

    Raises UsageError for an unknown recipe, a size that cannot be reached or a bundle that is quantized already,
    BundleError for a broken one, DataError for text that cannot be used or activations that are not finite.
    """
    start = time.perf_counter()
    name, rows = find_recipe(recipe)
    if rows.fills_target != (target_mb is not None):
        raise UsageError(f"recipe {name} {'needs' if rows.fills_target else 'takes no'} target size (--target-mb)")
    if target_mb is not None and not 0 < target_mb < math.inf:
        raise UsageError(f"target_mb is {target_mb:g}; give a size in MB, above 0")
    for option, value, known in (("prefill", prefill, prompts.PREFILLS), ("kv", kv, CACHES)):
        if value is not None and value not in known:
            raise UsageError(f"{option} is {value!r}; it must be one of {', '.join(known)}")
    threads = default_threads() if threads is None else checked_threads(threads)
    bundle = open_bundle(Path(source))
    _check_source(bundle)
    check_output(Path(out), bundle.path, force=force)
    verify(bundle)
    assert bundle.manifest is not None
    if calibration is not None and not Path(calibration).is_file():
        raise DataError(f"{calibration} is no file; give calibration text, or leave it out")
    job = _Job(bundle, rows, target_mb, prefill, kv, threads, seed, report)
    job.check(is_users=recipe != name)
    write = job.distilled(Path(out), calibration) if rows.distill_steps else job.rounded(calibration)
    with new_folder(Path(out), force=force) as folder:
        for file in bundle.manifest["files"]:
            if file not in (GRAPH, GRAPH_DATA, MANIFEST):
                shutil.copyfile(bundle.path / file, folder / file)
        kept = {fact: bundle.manifest[fact] for fact in _KEPT if fact in bundle.manifest}
        measured = write(folder)
        options = {"prefill": prefill if (folder / PREFILL).exists() else None, KV: kv}
        facts = kept | {name: value for name, value in options.items() if value} | measured
        write_manifest(folder, family=bundle.manifest["family"], recipe=name, packages=("onnx",), **facts)
    made = open_bundle(Path(out))
    remove_work(Path(out))
    return QuantizeResult(
        bundle=Path(out),
        recipe=name,
        size_mb=round(made.size_bytes / 1e6, 2),
        prefill_mb=round(made.prefill_bytes / 1e6, 2),
        kv=made.kv,
        kv_bytes_per_token=made.kv_bytes_per_token,
        seconds=round(time.perf_counter() - start, 2),
        peak_rss_mb=peak_rss_mb(),
    )


def _check_source(bundle: Bundle) -> None:
    if bundle.manifest is None:
        raise BundleError(f"{bundle.path} has no {MANIFEST}; quantize takes bundles that gptedge export made")
    if kind := bundle.manifest.get("graph"):
        raise UsageError(
            f"{bundle.path} cannot be quantized: its graph is of another kind ({kind}); "
            "export the model without --portable or --via"
        )
    if bundle.recipe not in FLOAT_RECIPES:
        cache = f", {KV} {bundle.manifest[KV]}" if KV in bundle.manifest else ""
        raise UsageError(
            f"{bundle.path} is quantized already ({bundle.recipe}{cache}); quantize the fp32 bundle it was made from"
        )


def _check_groups(recipe: Recipe, names: list[str]) -> None:
    """A group that matches no weight is a slip of the pen. A head that is the table has no name of its own, and a small
    table no parts."""
    for group in recipe.groups:
        may_lack = group.match.startswith("head.weight") or (recipe.common_tokens and group.match.endswith(PARTS))
        if not may_lack and not any(fnmatchcase(name, group.match) for name in names):
            kinds = dict.fromkeys(re.sub(r"\d+", "*", name) for name in names)
            raise UsageError(f"no weight has a name like {group.match}; the bundle has {', '.join(kinds)}")


@contextmanager
def _loading_torch() -> Iterator[None]:
    """Around importing what needs torch, whose threads are to wait as training's do. Raises MissingExtraError."""
    import gptedge.train  # noqa: F401  (before torch, which looks once)

    try:
        yield
    except ModuleNotFoundError as e:
        raise MissingExtraError(f"{e.name} is not installed, which this needs; install gptedge[train]") from None


@dataclass(frozen=True)
class _Job:
    bundle: Bundle
    recipe: Recipe
    target_mb: float | None
    prefill: str | None
    kv: str | None
    threads: int
    seed: int
    report: Report

    def check(self, *, is_users: bool) -> None:
        """Refuse what the recipe cannot mean, before time is spent; a user's must mean something by every group."""
        model = load_graph(self.bundle.path / GRAPH)
        read = partial(read_initializer, folder=self.bundle.path)
        split_tables(model, read, self.recipe.common_tokens, self._special)
        targets = find_targets(model, self.recipe)
        if is_users:
            _check_groups(self.recipe, find_matrices(model))
        if self.target_mb is not None:
            least = (mixed.smallest(targets) + self._other_bytes(model, targets)) / 1e6
            if least > self.target_mb:
                raise UsageError(
                    f"a target size of {self.target_mb:g} MB cannot be reached; the smallest is {least + 0.005:.2f} MB"
                )

    def rounded(self, calibration: Path | None) -> Callable[[Path], Facts]:
        """Draw the text; what then writes the graphs into a bundle's folder."""
        windows = self._rounding_windows(calibration)
        return partial(self.write_graphs, write=partial(self.write_graph, windows=windows), windows=windows)

    def _rounding_windows(self, calibration: Path | None) -> Windows | None:
        """The text that rounding, and what comes with it, needs."""
        if self.recipe.uses("gptq"):
            return self._windows(calibration, self.recipe.calibration_windows, calibration_text.WINDOW)
        needed = self.recipe.smooths or self.prefill or self.kv
        return self._windows(calibration, smooth.WINDOWS, smooth.WINDOW) if needed else None

    def distilled(self, out: Path, calibration: Path | None) -> Callable[[Path], Facts]:
        """Round and train beside `out`, or go on with what was begun there; what then writes the graph into a folder.

        Raises MissingExtraError without torch.
        """
        with _loading_torch():
            from gptedge.quantize import distill
        assert self.bundle.manifest is not None
        weights = [entry["sha256"] for entry in self.bundle.manifest["files"].values()]
        text = sha256(calibration) if calibration else None
        work = work_folder(out, weights, self.recipe, text, self.seed, self.prefill)
        start, windows = work / START, work / "windows.npy"
        if not windows.is_file():
            drawn = self._windows(calibration, self.recipe.distill_steps + distill.HELD_OUT, calibration_text.WINDOW)
            work.mkdir(parents=True, exist_ok=True)
            with new_file(windows) as path, path.open("wb") as file:
                np.save(file, drawn)
        text_ids = np.load(windows)
        if not start.is_dir():
            with new_folder(start) as folder:
                self.write_graph(folder, self._rounding_windows(calibration) if calibration else text_ids)
        changed = distill.distill(
            self.bundle,
            work,
            text_ids,
            steps=self.recipe.distill_steps,
            seed=self.seed,
            threads=self.threads,
            report=self.report,
        )
        return partial(self.write_graphs, write=partial(_copy_graph, start, changed=changed), windows=text_ids)

    def _windows(self, calibration: Path | None, count: int, length: int) -> Windows:
        """Up to `count` windows of a file, or of what the model writes itself, [n_windows, T]."""
        length = min(length, int(self.bundle.genai_config["model"]["context_length"]))
        if calibration:
            return text_windows(calibration, self.bundle, count, length, seed=self.seed)
        count = min(count, calibration_text.OWN_WINDOWS)
        return own_windows(self.bundle, count, length, threads=self.threads, seed=self.seed, report=self.report)

    def write_graphs(self, folder: Path, write: Callable[[Path], Facts], windows: Windows | None) -> Facts:
        """Let `write` fill the folder of a bundle, then change the kind of its KV cache, measured as it is by then."""
        facts = write(folder)
        if self.kv and windows is not None:
            quantize_cache(folder, _few(windows), self.threads)
        return facts

    def write_graph(self, folder: Path, windows: Windows | None) -> Facts:
        """What was measured meanwhile is returned."""
        model = load_graph(self.bundle.path / GRAPH)
        read: Read = partial(read_initializer, folder=self.bundle.path)
        with WeightFile(folder / GRAPH_DATA) as file, ThreadPoolExecutor(self.threads) as pool:
            targets = find_targets(model, self.recipe)
            evened = [t for t in targets if t.group.equalize and not t.lookups]
            equalized = equalize(model, read, targets, chosen=evened)
            read = equalized.rescaling.read
            read = split_tables(model, read, self.recipe.common_tokens, self._special)
            targets = find_targets(model, self.recipe)
            if self.target_mb is not None and windows is not None:
                targets = find_targets(model, self._plan(model, read, targets, windows, pool))
            smoothed = [t for t in targets if t.group.smooth]
            few, steps = None if windows is None else _few(windows), dict[str, float]()
            if few is not None and smoothed:
                walk = Walk(model, read, few, threads=self.threads)
                smoothing = smooth.smoothed(model, read, walk, smoothed)
                read, steps = smoothing.read, smoothing.steps
            source = copy.deepcopy(model)
            calibrator = None
            if windows is not None and any(t.is_calibrated for t in targets):
                weights = self._token_weights(model, read, windows, targets) if self.recipe.weigh_tokens else {}
                calibrator = Calibrator(model, read, windows, token_weights=weights, threads=self.threads, pool=pool)
            known = {t.weight for t in targets} - {t.weight for t in smoothed}  # smoothing changes what counts
            importance = {name: value for name, value in equalized.importance.items() if name in known}
            self._rewrite(model, targets, read, steps, importance, calibrator, file, pool)
        integer_products.save(folder / GRAPH, model)
        if few is not None and self.prefill and prompts.gains(targets):
            prompts.write_prefill(folder, source, model, read, few, self.threads)
        elif self.prefill and self.kv:  # whose keys are read slowly by many rows at once (see kv_cache.py)
            prompts.write_own(folder, model)
        return {OUTPUT_ERRORS: calibrator.output_errors} if calibrator else {}

    @property
    def _special(self) -> list[int]:
        """Ids of the tokens that begin, end and fill up texts."""
        model = self.bundle.genai_config["model"]
        others = (model.get(name) for name in ("bos_token_id", "pad_token_id"))
        return [*self.bundle.eos_ids, *(i for i in others if i is not None)]

    def _token_weights(
        self, model: onnx.ModelProto, read: Read, windows: Windows, targets: list[Target]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Raises MissingExtraError without torch."""
        with _loading_torch():
            from gptedge.quantize.token_weights import token_weights
        products = {name for t in targets if t.is_calibrated for name in t.products}
        return token_weights(model, read, windows, products, seed=self.seed, threads=self.threads, report=self.report)

    def _plan(
        self, model: onnx.ModelProto, read: Read, targets: list[Target], windows: Windows, pool: Executor
    ) -> Recipe:
        """The recipe that fills `target_mb`."""
        assert self.target_mb is not None
        budget = int(self.target_mb * 1e6) - self._other_bytes(model, targets)
        subject = mixed.Subject(model, read, targets, self.threads, pool)
        return mixed.plan(subject, windows, budget, self.report)

    def _other_bytes(self, model: onnx.ModelProto, targets: list[Target]) -> int:
        """What a bundle takes, at most, besides the weights of `targets`."""
        quantized = {t.weight for t in targets}
        kept = sum(
            math.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
            for t in model.graph.initializer
            if t.name not in quantized
        )
        # The graph grows by some nodes, and each weight's bytes begin on a page.
        return kept + 2 * (self.bundle.path / GRAPH).stat().st_size + PAGE * len(targets)

    def _rewrite(
        self,
        model: onnx.ModelProto,
        targets: list[Target],
        read: Read,
        steps: Mapping[str, float],
        importance: Mapping[str, npt.NDArray[np.float32]],
        calibrator: Calibrator | None,
        file: WeightFile,
        pool: Executor,
    ) -> None:
        initializers = {t.name: t for t in model.graph.initializer}
        total, done = sum(t.rows * t.width for t in targets), 0

        def store(target: Target) -> dict[str, TensorProto]:
            nonlocal done
            rows = read(initializers[target.weight])
            blocks: Blocks | Columns
            if calibrator and target.is_calibrated:
                blocks = calibrator.quantize(target, rows, steps.get(target.weight))
            elif target.scheme.whole_rows:
                blocks = Columns.of(rows, steps.get(target.weight))
            else:
                blocks = quantize_matrix(rows, target.scheme, importance.get(target.weight), pool)
            if calibrator:
                calibrator.put_in_place(target, blocks)
            done += rows.size
            self.report(done, total, "weights")
            arrays = arrays_of(target, blocks)
            return {role: file.add(f"{target.weight}.{role}", [array]) for role, array in arrays.items()}

        def keep(tensor: TensorProto) -> TensorProto:
            if tensor.data_location != TensorProto.EXTERNAL:
                return onnx.numpy_helper.from_array(read(tensor), tensor.name)
            return file.add(tensor.name, [read(tensor)])

        rewrite(model, targets, store, keep)


def _few(windows: Windows) -> Windows:
    """As many as show how large values become."""
    return windows[: max(1, smooth.WINDOWS * smooth.WINDOW // windows.shape[1])]


def _copy_graph(source: Path, folder: Path, *, changed: Mapping[str, npt.NDArray[Any]]) -> Facts:
    """The graph of one folder in another, with other values of some initializers; each stays at its place in the file,
    where the graph for prompts finds the table."""
    model = load_graph(source / GRAPH)
    for name in PREFILL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    with WeightFile(folder / GRAPH_DATA) as file:
        for tensor in sorted(model.graph.initializer, key=offset_of):
            value = changed.get(tensor.name, read_initializer(tensor, source))
            is_inline = tensor.data_location != TensorProto.EXTERNAL
            made = onnx.numpy_helper.from_array(value, tensor.name) if is_inline else file.add(tensor.name, [value])
            tensor.CopyFrom(made)
    save_graph(folder / GRAPH, model)
    return {}
