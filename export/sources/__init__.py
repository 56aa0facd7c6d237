"""Anything gptedge can export, opened as one `Checkpoint`: a Hugging Face folder, a GGUF file, a nanoGPT .pt.

Folders and GGUF files are opened without torch; only a nanoGPT checkpoint, which is a pickle, needs it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from gptedge.bundle import GRAPH
from gptedge.checkpoint import (
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    Checkpoint,
    open_checkpoint,
    read_json_object,
)
from gptedge.errors import CheckpointError
from gptedge.lora_files import ADAPTER_CONFIG

__all__ = ["open_source", "with_tokenizer"]

_EXPECTED = "a Hugging Face folder with config.json, a .gguf file or a nanoGPT .pt file is expected"
_OTHERS = {
    ADAPTER_CONFIG: "is a LoRA adapter, not a model; give the model it was trained on, or see gptedge adapter --help",
    GRAPH: "is a bundle, not a checkpoint; give what it was exported from",
}
"""Folders that are taken for a source, by a file of theirs."""
_MAGIC = b"GGUF"
_SENTENCEPIECE = "tokenizer.model"


def open_source(path: Path) -> Checkpoint:
    """Open a SOURCE. Raises CheckpointError or UnsupportedModelError, in one line, for what cannot be opened."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; {_EXPECTED}")
    if path.suffix == ".gguf" or _starts_with_magic(path):
        return _open_gguf(path)
    if path.suffix in (".pt", ".pth"):
        from gptedge.export.sources.nanogpt import open_nanogpt  # torch: 1.5 s

        return open_nanogpt(path)
    raise CheckpointError(f"{path} is not a source that can be opened; {_EXPECTED}")


def with_tokenizer(checkpoint: Checkpoint, tokenizer: Path | None) -> Checkpoint:
    """The checkpoint with another tokenizer.json, if one is given. Raises CheckpointError when it cannot be read."""
    if tokenizer is None:
        return checkpoint
    try:
        content = Path(tokenizer).read_bytes()
    except OSError as e:
        raise CheckpointError(f"tokenizer {tokenizer} cannot be read: {e.strerror}") from None
    return replace(checkpoint, side_files={**checkpoint.side_files, TOKENIZER: content})


def _open_folder(path: Path) -> Checkpoint:
    if not any((path / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        for name, said in _OTHERS.items():
            if (path / name).is_file():
                raise CheckpointError(f"{path} {said}")
    if (path / CONFIG).is_file():
        return _with_sentencepiece(open_checkpoint(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _open_gguf(files[0])
    if files:
        raise CheckpointError(f"{path} holds {len(files)} .gguf files; name the one to open, for example {files[0]}")
    raise CheckpointError(f"{path} has neither {CONFIG} nor a .gguf file; {_EXPECTED}")


def _with_sentencepiece(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a tokenizer.json, made from a SentencePiece model where that is all there is."""
    model, files = checkpoint.path / _SENTENCEPIECE, checkpoint.side_files
    if TOKENIZER in files or not model.is_file():
        return checkpoint
    from gptedge.export.sources.sentencepiece_model import read_sentencepiece

    config = read_json_object(checkpoint.path / TOKENIZER_CONFIG) if TOKENIZER_CONFIG in files else {}
    made = json.dumps(read_sentencepiece(model, config), ensure_ascii=False).encode()
    return replace(checkpoint, side_files={TOKENIZER: made, **files})


def _open_gguf(path: Path) -> Checkpoint:
    from gptedge.export.sources.gguf_file import open_gguf  # the gguf package: 0.2 s

    return open_gguf(path)


def _starts_with_magic(path: Path) -> bool:
    try:
        with path.open("rb") as f:
            return f.read(len(_MAGIC)) == _MAGIC
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from None
