"""Architectures that the table of families lacks, exported by optimum and turned into a bundle of ours.

optimum traces transformers' own PyTorch model, so whatever both know works, at the price of torch and of a graph
without onnxruntime's fused attention: its KV cache grows, and it cannot be quantized here. The loaded model is then the
oracle of the comparison that every export goes through. Imports of optimum, transformers and torch stay inside
functions: together they take seconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptedge.bundle import GENAI_CONFIG, GRAPH, GRAPH_DATA, Bundle, open_bundle
from gptedge.checkpoint import CONFIG, SIDE_FILES, TOKENIZER, read_json_object
from gptedge.errors import CheckpointError, MissingExtraError, UnsupportedModelError
from gptedge.export.genai import genai_config
from gptedge.files import write_json
from gptedge.onnx_file import WeightFile, load_graph, read_initializer, save_graph
from gptedge.runtime.session import Session
from gptedge.runtime.signature import Signature, context_length
from gptedge.safetensors import FloatArray

OPTIMUM = "optimum"
"""What a manifest calls such a graph, and --via the way to it."""
PACKAGES = ("onnx", "optimum-onnx", "torch", "transformers")
"""What the bundle's bytes depend on, besides gptedge."""
_TASK = "text-generation-with-past"
_GAPS = {
    "missing_keys": "has no tensor",
    "mismatched_keys": "has another shape than config.json implies for",
    "unexpected_keys": "has a tensor that the model does not use,",
}
"""What transformers reports of a checkpoint that it loaded all the same."""


@dataclass(frozen=True)
class Traced:
    """What optimum was given, transformers' model, and what the graph that it made says of itself."""

    model: Any
    signature: Signature

    @property
    def family(self) -> str:
        return str(self.model.config.model_type)

    def logits(self, ids: list[int]) -> FloatArray:
        """[T] -> [T, vocab_size], without a cache."""
        import torch

        with torch.no_grad():
            rows = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return np.asarray(rows.float().numpy(), np.float32)


def write_bundle(source: Path, folder: Path, *, tokenizer: Path | None = None) -> Traced:
    """Fill `folder` with a bundle of the Hugging Face folder `source`, all but its manifest.

    `tokenizer` is a tokenizer.json that takes the place of the source's.

    Raises MissingExtraError without optimum, CheckpointError for a folder that transformers cannot load whole, and
    UnsupportedModelError for an architecture that optimum cannot export.
    """
    source = Path(source)
    if not (source / CONFIG).is_file():
        raise CheckpointError(f"{source} has no {CONFIG}; --via optimum takes Hugging Face folders")
    config = read_json_object(source / CONFIG)
    context_length(config, source)  # refused here, by the name of the source
    with tempfile.TemporaryDirectory(prefix="optimum.", dir=folder) as scratch, _quiet():
        _check_known(config)
        model = _load(source)
        _trace(model, Path(scratch))
        _take_side_files([source, Path(scratch)], folder)
        _take_graph(Path(scratch), folder)
    if tokenizer:
        shutil.copyfile(tokenizer, folder / TOKENIZER)
    if not (folder / TOKENIZER).is_file():
        raise CheckpointError(
            f"{source} has no {TOKENIZER}, and none could be made of what it has; give --tokenizer FILE"
        )
    bundle = open_bundle(folder)
    traced = Traced(model, Session(bundle, provider="cpu", check=False).signature)
    write_json(folder / GENAI_CONFIG, _genai_config(traced, bundle))
    return traced


def _check_known(config: Mapping[str, Any]) -> None:
    """Refuse what optimum does not know before anything is loaded."""
    try:
        from optimum.exporters.onnx import model_configs  # noqa: F401  (which fills the table of tasks)
        from optimum.exporters.tasks import TasksManager
    except ImportError as e:
        raise MissingExtraError(f"--via optimum needs optimum ({e}); install gptedge[optimum]") from None
    kind = str(config.get("model_type"))
    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(kind, "onnx", library_name="transformers")
    except KeyError:
        tasks = {}
    if _TASK not in tasks:
        raise UnsupportedModelError(f"optimum does not export {kind} as a decoder with a KV cache")


def _load(source: Path) -> Any:
    """transformers' model in float32. It would fill gaps in the weights with random numbers: those are refused."""
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    try:
        model, gaps = loader.from_pretrained(
            str(source),
            torch_dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # to be told of them
            output_loading_info=True,
        )
    except Exception as e:  # a damaged folder can raise anything
        raise CheckpointError(f"transformers cannot load {source}: {_first_line(e)}") from None
    for key, words in _GAPS.items():
        if names := sorted(n if isinstance(n, str) else n[0] for n in gaps[key]):
            raise CheckpointError(f"{source} {words} {names[0]} ({len(names)} such)")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(f"{source}: {name} holds numbers that are not finite (NaN or infinity)")
    return model.eval()


def _trace(model: Any, scratch: Path) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    model.config.use_cache = True
    try:
        onnx_export_from_model(model, scratch, task=_TASK, do_validation=False)
    except Exception as e:  # whatever tracing meets in a model
        raise UnsupportedModelError(f"optimum cannot export {model.config.model_type}: {_first_line(e)}") from None


def _take_side_files(places: list[Path], folder: Path) -> None:
    """The publisher's own files; what is missing, such as a converted tokenizer.json, as optimum wrote it."""
    for name in (CONFIG, *SIDE_FILES):
        found = next((place / name for place in places if (place / name).is_file()), None)
        if found:
            shutil.copyfile(found, folder / name)


def _take_graph(scratch: Path, folder: Path) -> None:
    """The graph, with its weights moved to one data file beside it."""
    model = load_graph(scratch / GRAPH)
    with WeightFile(folder / GRAPH_DATA) as file:
        for tensor in model.graph.initializer:
            if tensor.dims:
                tensor.CopyFrom(file.add(tensor.name, [read_initializer(tensor, scratch)]))
    save_graph(folder / GRAPH, model)


def _genai_config(traced: Traced, bundle: Bundle) -> dict[str, Any]:
    c, s = traced.model.config, traced.signature
    n_kv_head, head_dim = s.cache.shapes[0]
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {key: bundle.generation_config.get(key, bundle.config.get(key)) for key in keys}
    heads, width = int(c.num_attention_heads), int(c.hidden_size)
    shape = _Shape(s.n_layer, heads, n_kv_head, width, head_dim, s.vocab_size, s.context_length)
    return genai_config(shape, ids, shared=False, positions=s.takes_positions)


@dataclass(frozen=True)
class _Shape:
    """What genai_config.json tells of a model's sizes."""

    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    head_dim: int
    vocab_size: int
    context_length: int


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Offline, and nothing on standard output: what libraries have to tell goes to stderr or nowhere."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
