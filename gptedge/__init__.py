"""Train, export, quantize and chat with small GPTs, through ONNX Runtime and without Rust.

    import gptedge

    with gptedge.load("bundle/") as model:
        print(model.generate("Once upon a time", max_tokens=64))

Importing this package imports neither onnxruntime, onnx, torch nor textual; each comes when it is first needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gptedge.aio import AsyncChat, AsyncModel, AsyncStream
    from gptedge.config import ModelConfig, SamplingParams
    from gptedge.conversation import Chat
    from gptedge.errors import (
        BundleError,
        CheckpointError,
        ContextOverflowError,
        DataError,
        DownloadError,
        GateFailed,
        GptEdgeError,
        MissingExtraError,
        OutputExistsError,
        ParityError,
        SchemaError,
        TokenizerError,
        TrainingError,
        UnsupportedModelError,
        UsageError,
    )
    from gptedge.loading import load
    from gptedge.model import Model, chat, generate, stream
    from gptedge.runtime.generate import Chunk, Result, Stream, Timings, Usage

_HOMES = {
    "gptedge.aio": ("AsyncChat", "AsyncModel", "AsyncStream"),
    "gptedge.config": ("ModelConfig", "SamplingParams"),
    "gptedge.conversation": ("Chat",),
    "gptedge.errors": (
        "BundleError",
        "CheckpointError",
        "ContextOverflowError",
        "DataError",
        "DownloadError",
        "GateFailed",
        "GptEdgeError",
        "MissingExtraError",
        "OutputExistsError",
        "ParityError",
        "SchemaError",
        "TokenizerError",
        "TrainingError",
        "UnsupportedModelError",
        "UsageError",
    ),
    "gptedge.loading": ("load",),
    "gptedge.model": ("Model", "chat", "generate", "stream"),
    "gptedge.runtime.generate": ("Chunk", "Result", "Stream", "Timings", "Usage"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AsyncChat",
    "AsyncModel",
    "AsyncStream",
    "BundleError",
    "Chat",
    "CheckpointError",
    "Chunk",
    "ContextOverflowError",
    "DataError",
    "DownloadError",
    "GateFailed",
    "GptEdgeError",
    "MissingExtraError",
    "Model",
    "ModelConfig",
    "OutputExistsError",
    "ParityError",
    "Result",
    "SamplingParams",
    "SchemaError",
    "Stream",
    "Timings",
    "TokenizerError",
    "TrainingError",
    "UnsupportedModelError",
    "Usage",
    "UsageError",
    "__version__",
    "chat",
    "generate",
    "load",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
