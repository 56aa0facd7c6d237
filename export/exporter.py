"""Exporting: a checkpoint in, a bundle out, verified on the way. No torch; weights are streamed, one at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptedge.bundle import GENAI_CONFIG, GRAPH, GRAPH_DATA, LORA, check_output, open_bundle, write_manifest
from gptedge.chat_template import load_chat_template
from gptedge.checkpoint import CONFIG, GENERATION_CONFIG, TOKENIZER, Checkpoint, weights_id
from gptedge.config import ModelConfig
from gptedge.errors import CheckpointError, TokenizerError, UnsupportedModelError, UsageError
from gptedge.export import parity as parity_check
from gptedge.export.decoder import build
from gptedge.export.genai import genai_config
from gptedge.export.reference import Reference
from gptedge.export.rotary import MULTIPLE
from gptedge.export.sources import open_source, with_tokenizer
from gptedge.files import new_folder, seal, write_json
from gptedge.measure import peak_rss_mb
from gptedge.onnx_file import WeightFile, save_graph
from gptedge.progress import Report, silent
from gptedge.safetensors import finite
from gptedge.tokenizer import Tokenizer

DTYPES = ("fp32", "fp16")
"""How weights can be stored."""
EXPORTERS = ("optimum",)
"""Other programs that can write the graph."""
PORTABLE = "portable"
"""What a manifest calls the graph of such a bundle."""
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
    warnings: tuple[str, ...] = ()
    """What will not work in the bundle, though its graph does."""


def export(
    source: Path,
    out: Path,
    *,
    dtype: str = "fp32",
    portable: bool = False,
    lora_inputs: bool = False,
    via: str | None = None,
    verify: bool = True,
    tokenizer: Path | None = None,
    force: bool = False,
    report: Report = silent,
) -> ExportResult:
    """Write the bundle `out` from the checkpoint `source`; `tokenizer` is a tokenizer.json for a source without one.

    `dtype` is one of DTYPES; `portable` uses ONNX's standard operators alone; `lora_inputs` lets
    the bundle take LoRA adapters, at a small cost in speed; `via` names another exporter, one of
    EXPORTERS, for what the table of families lacks. Raises UsageError, CheckpointError, UnsupportedModelError,
    OutputExistsError, MissingExtraError, or ParityError when the graph does not compute what the checkpoint computes;
    then nothing is written.
    """
    start = time.perf_counter()
    _check_options(dtype, portable=portable, lora_inputs=lora_inputs, via=via)
    check_output(Path(out), Path(source), force=force)
    with new_folder(Path(out), force=force) as folder:
        if via:
            written = _write_via(Path(source), folder, tokenizer)
        else:
            checkpoint = with_tokenizer(open_source(Path(source)), tokenizer)
            written = _write(checkpoint, folder, dtype=dtype, portable=portable, lora=lora_inputs, report=report)
        with ThreadPoolExecutor(1, "gptedge-seal") as pool:
            sealed = pool.submit(seal, folder / GRAPH_DATA)  # beside the verification
            parity = _verify(folder, written, dtype) if verify else None
        facts: dict[str, Any] = {"graph": written.graph} if written.graph else {}
        facts |= {LORA: written.lora} if written.lora else {}
        facts |= {"parity": parity.as_json()} if parity else {}
        hashes = {GRAPH_DATA: sealed.result()}
        write_manifest(folder, family=written.family, recipe=dtype, packages=written.packages, hashes=hashes, **facts)
        size = open_bundle(folder).size_bytes
    return ExportResult(
        bundle=Path(out),
        family=written.family,
        size_mb=round(size / 1e6, 2),
        context_length=written.context_length,
        seconds=round(time.perf_counter() - start, 2),
        peak_rss_mb=peak_rss_mb(),
        parity=parity,
        warnings=tuple(filter(None, [load_chat_template(Path(out)).problem])),
    )


@dataclass(frozen=True)
class _Written:
    """A bundle that lacks its manifest, and its oracle."""

    family: str
    vocab_size: int
    context_length: int
    logits: parity_check.SourceLogits
    packages: tuple[str, ...] = PACKAGES
    graph: str | None = None
    """What the manifest calls a graph that is not the ordinary one."""
    lora: dict[str, str] | None = None
    """What the manifest says of the adapters that it takes."""


def _check_options(dtype: str, *, portable: bool, lora_inputs: bool, via: str | None) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if via is not None and via not in EXPORTERS:
        raise UsageError(f"via is {via!r}; it must be one of {', '.join(EXPORTERS)}")
    if via and (portable or lora_inputs or dtype != "fp32"):
        raise UsageError(
            f"--via {via} writes fp32 graphs of its own kind; leave out --portable, --lora-inputs and --dtype"
        )


def _write(checkpoint: Checkpoint, folder: Path, *, dtype: str, portable: bool, lora: bool, report: Report) -> _Written:
    config, weights = checkpoint.config, checkpoint.weights()
    if not portable:
        _check_kernels(config)
    _check_tokenizer(checkpoint.path, checkpoint.side_files.get(TOKENIZER), config.vocab_size)
    _check_token_ids(checkpoint.path, token_ids(checkpoint), config.vocab_size)
    _write_side_files(checkpoint, folder, shared=not portable)
    checked = replace(checkpoint, tensors=finite(checkpoint.tensors, checkpoint.path)).weights()
    with WeightFile(folder / GRAPH_DATA) as file:
        graph = build(config, checked, file, half=dtype == "fp16", portable=portable, lora=lora, report=report)
    save_graph(folder / GRAPH, graph)
    return _Written(
        checkpoint.family.name,
        config.vocab_size,
        config.context_length,
        Reference(config, weights).logits,
        graph=PORTABLE if portable else None,
        lora={"base": weights_id(weights)} if lora else None,
    )


def _write_via(source: Path, folder: Path, tokenizer: Path | None) -> _Written:
    from gptedge.export.via_optimum import OPTIMUM, PACKAGES, write_bundle

    traced = write_bundle(source, folder, tokenizer=tokenizer)
    vocab_size, context_length = traced.signature.vocab_size, traced.signature.context_length
    _check_tokenizer(source, (folder / TOKENIZER).read_bytes(), vocab_size)
    return _Written(traced.family, vocab_size, context_length, traced.logits, PACKAGES, OPTIMUM)


def _verify(folder: Path, written: _Written, dtype: str) -> parity_check.Parity:
    parity = parity_check.compare_stages(
        folder / GRAPH,
        written.logits,
        vocab_size=written.vocab_size,
        context_length=written.context_length,
    )
    parity_check.check(parity, dtype)
    return parity


def _write_side_files(checkpoint: Checkpoint, folder: Path, *, shared: bool) -> None:
    c = checkpoint.config
    for name, content in checkpoint.side_files.items():
        (folder / name).write_bytes(content)
    write_json(folder / CONFIG, checkpoint.hf_config)
    write_json(
        folder / GENAI_CONFIG, genai_config(c, token_ids(checkpoint), shared=shared, positions=c.position == "learned")
    )


def token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """bos, eos and pad ids: generation_config.json's before config.json's."""
    stated = json.loads(checkpoint.side_files.get(GENERATION_CONFIG, b"{}"))
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: stated.get(key, checkpoint.hf_config.get(key)) for key in keys}


def _check_token_ids(where: Path, ids: Mapping[str, Any], vocab_size: int) -> None:
    """A reply that no token can end goes on to its last one. What fills up rows is never read, and often made up."""
    for name in ("bos_token_id", "eos_token_id"):
        value = ids[name]
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < vocab_size for i in listed):
            raise CheckpointError(f"{where}: {name} is {value!r}; token ids go from 0 to {vocab_size - 1}")


def _check_kernels(config: ModelConfig) -> None:
    """Refuse what onnxruntime's attention would refuse at the first token."""
    if config.position == "rope" and config.head_dim % MULTIPLE:
        raise UnsupportedModelError(
            f"head_dim {config.head_dim} is not a multiple of {MULTIPLE}, which rotary embeddings in "
            "onnxruntime's GroupQueryAttention need; export it with --portable"
        )


def _check_tokenizer(where: Path, content: bytes | None, vocab_size: int) -> None:
    """A bundle that cannot read text is of no use: refuse it here rather than at its first prompt."""
    if content is None:
        raise CheckpointError(f"{where} has no {TOKENIZER}; give one with --tokenizer FILE")
    try:
        tokenizer = Tokenizer.from_dict(json.loads(content))
    except TokenizerError as e:
        raise TokenizerError(f"the tokenizer of {where}: {e}") from None
    except ValueError as e:
        raise CheckpointError(f"{where / TOKENIZER} is not JSON: {e}") from None
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(f"{where}: the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}")
