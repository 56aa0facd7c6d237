"""gptedge inspect: what a bundle is, without loading it."""

from __future__ import annotations

from typing import Any

from gptedge.bundle import open_bundle
from gptedge.cli.common import BundleArgument, Json, emit

# Title -> where genai_config.json's decoder entry, or its model entry, says it.
_SHAPE = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "head_dim": "head_size",
    "vocab_size": "vocab_size",
    "context_length": "context_length",
}


def command(bundle: BundleArgument, as_json: Json = False) -> None:
    """Describe a bundle."""
    opened = open_bundle(bundle)
    manifest = opened.manifest or {}
    model = opened.genai_config.get("model", {})
    where = {**model, **model.get("decoder", {})}
    value: dict[str, Any] = {
        "bundle": str(bundle),
        "family": manifest.get("family", "unknown"),
        "recipe": opened.recipe,
        "size_mb": round(opened.size_bytes / 1e6, 2),
        "prefill_mb": round(opened.prefill_bytes / 1e6, 2) or None,
        "kv": opened.kv,
        "kv_bytes_per_token": opened.kv_bytes_per_token,
        **{ours: where.get(theirs) for ours, theirs in _SHAPE.items()},
        "parity": manifest.get("parity"),
        "made_with": manifest.get("made_with", {}),
        "files": {name: entry["size"] for name, entry in manifest.get("files", {}).items()},
    }
    lines = [f"{key:18} {_show(entry)}" for key, entry in value.items() if entry not in (None, {})]
    emit(value, as_json=as_json, lines=lines)


def _show(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
