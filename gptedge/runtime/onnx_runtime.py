"""onnxruntime: imported late, with telemetry off, on the execution provider that is wanted or that works."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gptedge.errors import BundleError, MissingExtraError, UsageError
from gptedge.interrupts import interrupts_held

# MatMulInteger(a: uint8, b: int8) -> y, as an ONNX file of opset 13; tests write it anew with the onnx package.
_PRODUCT = (
    b'\x08\x07:h\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x07productZ\x15\n\x01a\x12\x10\n\x0e\x08\x02\x12\n\n\x03'
    b"\x12\x01m\n\x03\x12\x01kZ\x15\n\x01b\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01k\n\x03\x12\x01nb\x15\n\x01y\x12\x10"
    b"\n\x0e\x08\x06\x12\n\n\x03\x12\x01m\n\x03\x12\x01nB\x04\n\x00\x10\r"
)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


_ENVIRONMENT = {
    # Its wheels send telemetry unless told otherwise before the import; an offline tool stays offline.
    "ORT_DISABLE_TELEMETRY": "1",
    # Attention in tiles takes up to twice as long as all scores at once, and is never faster (benchmarks/LOG.md). What
    # tiles save in memory, `Session` saves by reading prompts in smaller pieces where texts are long.
    "ORT_GQA_DISABLE_FLASH_ATTENTION": "1",
}
"""What onnxruntime reads; a value that is set already stays."""


def import_onnxruntime() -> ModuleType:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with interrupts_held():
            import onnxruntime
    except ImportError as e:
        raise MissingExtraError(
            f"onnxruntime cannot be imported ({e}); install gptedge[cpu] or gptedge[cuda]"
        ) from None
    onnxruntime.set_default_logger_severity(3)  # errors only: nothing of ours depends on its warnings
    return onnxruntime


def choose_provider(wanted: str | None, available: list[str]) -> str:
    """The execution provider's full name: the one asked for, or CUDA where there is one, or the CPU."""
    if wanted is None:
        return PROVIDERS["cuda"] if PROVIDERS["cuda"] in available else PROVIDERS["cpu"]
    if wanted not in PROVIDERS:
        raise UsageError(f"provider is {wanted!r}; it must be one of {', '.join(PROVIDERS)}")
    if PROVIDERS[wanted] not in available:
        raise UsageError(f"provider {wanted} is not in this onnxruntime, which has {', '.join(available)}")
    return PROVIDERS[wanted]


def device_of(provider: str) -> str:
    """Where a provider, by its full name, keeps its tensors: cpu or cuda."""
    return next(name for name, full in PROVIDERS.items() if full == provider)


@cache
def multiplies_signed_bytes() -> bool:
    """Whether this processor multiplies unsigned by signed bytes exactly: those without VNNI add pairs of products in
    saturating 16 bits. Found out by a product whose pairs overflow them."""
    ort = import_onnxruntime()
    session = ort.InferenceSession(_PRODUCT, session_options(ort, 1), providers=[PROVIDERS["cpu"]])
    a, b = np.full((4, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    (got,) = session.run(None, {"a": a, "b": b})
    return bool((got == 64 * 255 * 127).all())


def open_graph(ort: Any, path: Path, options: Any, wanted: str | None) -> tuple[Any, str]:
    """An InferenceSession and the full name of the provider it runs on; `wanted` is as in `choose_provider`.

    Where nobody asked for CUDA and it cannot start (no driver, no library), the CPU takes its place. Raises UsageError
    when somebody did, BundleError when the graph cannot be loaded.
    """
    provider = choose_provider(wanted, ort.get_available_providers())
    if provider == PROVIDERS["cpu"]:
        return _load(ort, path, options, [provider]), provider
    try:
        # onnxruntime would fall back by itself, with a notice on standard output, where it spoils a JSON answer.
        session = _load(ort, path, options, [provider, PROVIDERS["cpu"]], enable_fallback=0)
        problem = "" if provider in session.get_providers() else "its libraries cannot be loaded"
    except BundleError as e:
        problem = str(e)
    if not problem:
        return session, provider
    if wanted:
        raise UsageError(f"provider {wanted} was asked for and cannot start: {problem}; use --provider cpu")
    return _load(ort, path, options, [PROVIDERS["cpu"]]), PROVIDERS["cpu"]


def _load(ort: Any, path: Path, options: Any, providers: list[str], **settings: Any) -> Any:
    try:
        return ort.InferenceSession(str(path), options, providers=providers, **settings)
    except Exception as e:  # onnxruntime's exceptions share no public base
        raise BundleError(f"{path} cannot be loaded: {str(e).splitlines()[0]}") from None


def session_options(ort: Any, threads: int) -> Any:
    """Options of a session that computes on `threads` cores, and on none while nothing runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads spin between the operators of a run, without which decoding loses a quarter of its speed, and sleep from
    # its end on, which costs nothing that could be measured; otherwise they would spin for 40 ms more.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
