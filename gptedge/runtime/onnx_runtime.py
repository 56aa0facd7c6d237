"""Importing onnxruntime: late, with telemetry off, and with one clear line when it is not installed."""

from __future__ import annotations

import os
from types import ModuleType

from gptedge.errors import MissingExtraError, UsageError
from gptedge.interrupts import interrupts_held

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def import_onnxruntime() -> ModuleType:
    # Its wheels send telemetry unless told otherwise before the import; an offline tool stays offline.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
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


def default_threads() -> int:
    """Cores this process may use; hyper-threads and other processes' cores are the operating system's to tell apart."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
