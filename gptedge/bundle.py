"""Bundles: folders that hold everything needed to run a model, each file pinned by its sha256 in manifest.json.

    model.onnx  model.onnx.data  tokenizer.json  tokenizer_config.json  config.json  generation_config.json
    prefill.onnx  prefill.onnx.data (where prompts have a graph of their own: see quantize/prefill.py)
    model.signed.onnx  prefill.signed.onnx (beside graphs with products of integers: see quantize/integer_products.py)
    chat_template.jinja (where there is one)  genai_config.json (for onnxruntime-genai)  manifest.json

Reading needs only the standard library. Folders without a manifest (made by other programs) open too; they cannot be
verified.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptedge.errors import BundleError, UsageError
from gptedge.files import check_destination, sha256, write_json

FORMAT_VERSION = 1


def signed(graph: str) -> str:
    """The name of the same graph, over the same bytes, for processors that multiply signed bytes exactly."""
    return graph.replace(".onnx", ".signed.onnx")


GRAPH, GRAPH_DATA = "model.onnx", "model.onnx.data"
PREFILL, PREFILL_DATA = "prefill.onnx", "prefill.onnx.data"
PREFILL_FILES = (PREFILL, signed(PREFILL), PREFILL_DATA)
CONFIG, GENERATION_CONFIG, GENAI_CONFIG = "config.json", "generation_config.json", "genai_config.json"
TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
MANIFEST = "manifest.json"
LORA = "lora"
"""The manifest's entry of a bundle whose graph takes adapters; `base` is `checkpoint.weights_id` of its model."""
KV = "kv"
"""The manifest's entry of a bundle whose graphs keep keys and values in fewer bits than float32; it names the type."""
OUTPUT_ERRORS = "output_errors"
"""Where the manifest of a calibrated bundle says what rounding each weight changed of its product's outputs."""


_OF_MODELS = (MANIFEST, GRAPH, GENAI_CONFIG, CONFIG)
"""Each tells a folder that a bundle may take the place of: another bundle, or a checkpoint."""
_KV_BYTES = {"float32": 4, "int8": 1}
_KV_SIZES = ("num_hidden_layers", "num_key_value_heads", "head_size")


@dataclass(frozen=True)
class Bundle:
    path: Path
    manifest: Mapping[str, Any] | None
    """manifest.json, or None where there is none."""
    config: Mapping[str, Any]
    """config.json (Hugging Face's format); empty where there is none."""
    generation_config: Mapping[str, Any]
    genai_config: Mapping[str, Any]

    @property
    def recipe(self) -> str:
        """What the weights are: fp32, int8, …; "unknown" without a manifest."""
        return str(self.manifest["recipe"]) if self.manifest else "unknown"

    @property
    def size_bytes(self) -> int:
        """Bytes of the graph and its weights, those of a prefill graph not counted."""
        return sum(f.stat().st_size for f in self.path.iterdir() if ".onnx" in f.name) - self.prefill_bytes

    @property
    def prefill_bytes(self) -> int:
        """Bytes that the prefill graph adds; 0 without one."""
        files = (self.path / name for name in PREFILL_FILES)
        return sum(f.stat().st_size for f in files if f.exists())

    @property
    def kv(self) -> str:
        """What keys and values are kept as: float32, int8; "unknown" without a manifest."""
        return str(self.manifest.get(KV, "float32")) if self.manifest else "unknown"

    @property
    def kv_bytes_per_token(self) -> int | None:
        """Of the KV cache of one text; None where nothing says it."""
        decoder = self.genai_config.get("model", {}).get("decoder", {})
        sizes = [decoder.get(name) for name in _KV_SIZES]
        if None in sizes or self.kv not in _KV_BYTES:
            return None
        return 2 * math.prod(sizes) * _KV_BYTES[self.kv]

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text, from generation_config.json or else config.json."""
        for source in (self.generation_config, self.config):
            value = source.get("eos_token_id")
            if value is not None:
                return frozenset(value if isinstance(value, list) else [value])
        return frozenset()


def open_bundle(folder: Path) -> Bundle:
    """Open a bundle whose files are there with the sizes that its manifest gives (`verify` checks their bytes)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"bundle {folder} does not exist" if not folder.exists() else f"{folder} is not a folder")
    for name in (GRAPH, TOKENIZER):
        if not (folder / name).is_file():
            hint = "; this is a checkpoint, run gptedge export first" if (folder / "model.safetensors").exists() else ""
            raise BundleError(f"{folder} is not a bundle: {name} is missing{hint}")
    manifest = _read(folder / MANIFEST)
    if manifest is not None:
        _check_manifest(folder, manifest)
    parts = [_read(folder / name) or {} for name in (CONFIG, GENERATION_CONFIG, GENAI_CONFIG)]
    return Bundle(folder, manifest, *parts)


def verify(bundle: Bundle, *, names: Iterable[str] | None = None) -> None:
    """Compare files' sha256 with the manifest. Raises BundleError naming the first that differs."""
    if bundle.manifest is None:
        raise BundleError(f"{bundle.path} has no {MANIFEST}, so nothing says what its files should be")
    files = bundle.manifest["files"]
    for name in files if names is None else names:
        if sha256(bundle.path / name) != files[name]["sha256"]:
            raise BundleError(
                f"{bundle.path / name} is not the file that {MANIFEST} describes (sha256 differs); "
                "make the bundle again"
            )


def fingerprint(bundle: Bundle) -> str:
    """A sha256 that tells this bundle from every other: of the manifest's hashes, or of the files' where there is none.

    Without a manifest every graph, weight and tokenizer file is read.
    """
    if bundle.manifest is not None:
        hashes = {name: entry["sha256"] for name, entry in bundle.manifest["files"].items()}
    else:
        files = [f for f in bundle.path.iterdir() if ".onnx" in f.name or f.name == TOKENIZER]
        hashes = {f.name: sha256(f) for f in files}
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def check_output(out: Path, source: Path, *, force: bool) -> None:
    """Refuse early a folder that a bundle made from `source` cannot take the place of, or may not.

    Raises OutputExistsError without `force`, UsageError where replacing it would remove the source, or files that are
    no model's.
    """
    if source.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{out} is the source, or holds it, and would be replaced; choose another output")
    check_destination(out, force=force)
    if not out.is_dir() or out.is_symlink():  # a link alone is replaced
        return
    found = {file.name for file in out.iterdir()}
    if found and found.isdisjoint(_OF_MODELS):
        raise UsageError(
            f"{out} is no bundle or checkpoint, and {min(found)} in it would be lost; choose another output"
        )
    if lost := found - {MANIFEST, *_listed(out, found)}:
        raise UsageError(f"{min(lost)} in {out} is no part of the bundle, and would be lost; move it elsewhere first")


def _listed(folder: Path, found: set[str]) -> Iterable[str]:
    """Files that the manifest names; `found` where there is none that could be read."""
    with suppress(BundleError):
        files = (_read(folder / MANIFEST) or {}).get("files")
        return files if isinstance(files, dict) else found
    return found


def write_manifest(
    folder: Path,
    *,
    family: str,
    recipe: str,
    packages: Iterable[str],
    hashes: Mapping[str, str] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Describe every file in `folder`. `facts` are further JSON entries, such as measured parity. No timestamps.

    `hashes` are the sha256 that are known already, by the file's name.
    """
    from importlib import metadata  # 40 ms, which nobody who only reads bundles should wait for

    known = dict(hashes or {})
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name != MANIFEST)
    manifest = {
        "format_version": FORMAT_VERSION,
        "family": family,
        "recipe": recipe,
        **facts,
        "made_with": {name: metadata.version(name) for name in ("gptedge", *packages)},
        "files": {f.name: {"size": f.stat().st_size, "sha256": known.get(f.name) or sha256(f)} for f in files},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise BundleError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise BundleError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def _check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    version, files = manifest.get("format_version"), manifest.get("files")
    if version != FORMAT_VERSION:
        raise BundleError(f"{folder} has bundle format {version!r}; this gptedge reads {FORMAT_VERSION}")
    if not isinstance(files, dict) or "recipe" not in manifest:
        raise BundleError(f"{folder / MANIFEST} lacks its files or its recipe")
    for name, entry in files.items():
        if Path(name).name != name:
            raise BundleError(f"{folder / MANIFEST} names {name!r}, which lies outside the folder")
        if not (folder / name).is_file():
            raise BundleError(f"{folder / name} is missing; the manifest names it")
        size = (folder / name).stat().st_size
        if size != entry.get("size"):
            raise BundleError(f"{folder / name} has {size} bytes; the manifest says {entry.get('size')}")
