"""GGUF files (llama.cpp's format) as Hugging Face checkpoints: config.json, tensors and side files, made on opening.

Weights are dequantized to float32 a few MB at a time, when read; their names are a row of the table of families, as the
publisher's own are. Architectures are rows of `gguf_configs`; one that has no row is refused by name. Split files and
mixtures of experts are not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptedge.checkpoint import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, Checkpoint
from gptedge.export.sources import gguf_container
from gptedge.export.sources.gguf_configs import read_config
from gptedge.export.sources.gguf_tokenizer import GgufTokenizer, read_tokenizer


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file as a checkpoint. CheckpointError: it is damaged. UnsupportedModelError: it is something else."""
    path = Path(path)
    file = gguf_container.read(path)
    tokenizer = read_tokenizer(path, file.metadata)
    config = read_config(path, file, tokenizer.ids if tokenizer else {})
    return Checkpoint(path, config, file.tensors, _side_files(file.metadata, config, tokenizer), is_gguf=True)


def _side_files(
    metadata: Mapping[str, Any], config: dict[str, Any], tokenizer: GgufTokenizer | None
) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    context = config.get("max_position_embeddings") or config["n_positions"]
    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    files = {
        TOKENIZER: _json(tokenizer.tokenizer_json, indent=None),
        TOKENIZER_CONFIG: _json(
            tokenizer.tokenizer_config
            | {"model_max_length": context, "clean_up_tokenization_spaces": False}
            | ({"chat_template": template} if template else {})
        ),
        GENERATION_CONFIG: _json(tokenizer.ids | tokenizer.stop_ids),
    }
    return files | ({CHAT_TEMPLATE: template.encode()} if template else {})


def _json(value: Any, *, indent: int | None = 2) -> bytes:
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()
