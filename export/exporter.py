"""Exporting: a checkpoint in, a bundle out, verified on the way. No torch; weights are streamed, one at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptedge.bundle import GENAI_CONFIG, GRAPH, GRAPH_DATA, open_bundle, write_manifest
from gptedge.checkpoint import CONFIG, GENERATION_CONFIG, TOKENIZER, Checkpoint
from gptedge.config import ModelConfig
from gptedge.errors import CheckpointError, UnsupportedModelError, UsageError
from gptedge.export import parity as parity_check
from gptedge.export.decoder import Report, build, silent
from gptedge.export.genai import genai_config
from gptedge.export.reference import Reference
from gptedge.export.rotary import MULTIPLE
from gptedge.export.sources import open_source
from gptedge.files import check_destination, new_folder, seal, write_json
from gptedge.measure import peak_rss_mb
from gptedge.onnx_file import WeightFile, save_graph
from gptedge.safetensors import Tensor
from gptedge.tokenizer import Tokenizer

DTYPES = ("fp32", "fp16")
"""How weights can be stored."""
PACKAGES = ("onnx",)
"""What a bundle's bytes depend on, besides gptedge."""


@dataclass(frozen=True)
class ExportResult:
    bundle: Path
    family: str
    size_mb: float
    """Graph and weights, 10^6 bytes."""
    context_length: int
    """Tokens; fewer than config.json's where a rotary scaling cannot go further with a cache (longrope)."""
    seconds: float
    peak_rss_mb: float
    parity: parity_check.Parity | None
    """None when verification was turned off."""


def export(
    source: Path,
    out: Path,
    *,
    dtype: str = "fp32",
    verify: bool = True,
    tokenizer: Path | None = None,
    force: bool = False,
    report: Report = silent,
) -> ExportResult:
    """Write the bundle `out` from the checkpoint `source`; `tokenizer` is a tokenizer.json for a source without one.

    `dtype` is one of DTYPES. Raises UsageError, CheckpointError, UnsupportedModelError, OutputExistsError, or
    ParityError when the graph does not compute what the checkpoint computes; then nothing is written.
    """
    start = time.perf_counter()
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    check_destination(out, force=force)
    checkpoint = _with_tokenizer(open_source(Path(source)), tokenizer)
    config, weights = checkpoint.config, checkpoint.weights()
    _check_kernels(config)
    _check_tokenizer(checkpoint, config.vocab_size)
    with new_folder(Path(out), force=force) as folder:
        _write_side_files(checkpoint, folder)
        with WeightFile(folder / GRAPH_DATA) as file:
            graph = build(config, weights, file, half=dtype == "fp16", report=report)
        save_graph(folder / GRAPH, graph)
        with ThreadPoolExecutor(1, "gptedge-seal") as pool:
            sealed = pool.submit(seal, folder / GRAPH_DATA)  # beside the verification
            parity = _verify(folder, config, weights, dtype) if verify else None
        facts: dict[str, Any] = {"parity": parity.as_json()} if parity else {}
        hashes = {GRAPH_DATA: sealed.result()}
        write_manifest(folder, family=checkpoint.family.name, recipe=dtype, packages=PACKAGES, hashes=hashes, **facts)
        size = open_bundle(folder).size_bytes
    return ExportResult(
        bundle=Path(out),
        family=checkpoint.family.name,
        size_mb=round(size / 1e6, 2),
        context_length=config.context_length,
        seconds=round(time.perf_counter() - start, 2),
        peak_rss_mb=peak_rss_mb(),
        parity=parity,
    )


def _verify(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], dtype: str) -> parity_check.Parity:
    parity = parity_check.compare_stages(
        folder / GRAPH,
        Reference(config, weights).logits,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
    )
    parity_check.check(parity, dtype)
    return parity


def _with_tokenizer(checkpoint: Checkpoint, tokenizer: Path | None) -> Checkpoint:
    if tokenizer is None:
        return checkpoint
    try:
        content = Path(tokenizer).read_bytes()
    except OSError as e:
        raise CheckpointError(f"tokenizer {tokenizer} cannot be read: {e.strerror}") from None
    return replace(checkpoint, side_files={**checkpoint.side_files, TOKENIZER: content})


def _write_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    for name, content in checkpoint.side_files.items():
        (folder / name).write_bytes(content)
    write_json(folder / CONFIG, checkpoint.hf_config)
    write_json(folder / GENAI_CONFIG, genai_config(checkpoint.config, token_ids(checkpoint)))


def token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """bos, eos and pad ids: generation_config.json's before config.json's."""
    stated = json.loads(checkpoint.side_files.get(GENERATION_CONFIG, b"{}"))
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: stated.get(key, checkpoint.hf_config.get(key)) for key in keys}


def _check_kernels(config: ModelConfig) -> None:
    """Refuse what onnxruntime's attention would refuse at the first token."""
    if config.position == "rope" and config.head_dim % MULTIPLE:
        raise UnsupportedModelError(
            f"head_dim {config.head_dim} is not a multiple of {MULTIPLE}, which rotary embeddings in "
            "onnxruntime's GroupQueryAttention need"
        )


def _check_tokenizer(checkpoint: Checkpoint, vocab_size: int) -> None:
    """A bundle that cannot read text is of no use: refuse it here rather than at its first prompt."""
    if TOKENIZER not in checkpoint.side_files:
        raise CheckpointError(f"{checkpoint.path} has no {TOKENIZER}; give one with --tokenizer FILE")
    try:
        tokenizer = Tokenizer.from_dict(json.loads(checkpoint.side_files[TOKENIZER]))
    except ValueError as e:
        raise CheckpointError(f"{checkpoint.path / TOKENIZER} is not JSON: {e}") from None
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}"
        )
