"""gptedge doctor: what this machine has, and what is missing for each job."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

from gptedge.cli.common import Json, emit

# extra -> the modules it needs, and the distributions they come from
_EXTRAS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")},
    "export": {"onnx": ("onnx",), "gguf": ("gguf",)},
    "quantize": {"onnx": ("onnx",)},
    "train": {"torch": ("torch",)},
    "tui": {"textual": ("textual",)},
    "serve": {"starlette": ("starlette",), "uvicorn": ("uvicorn",)},
    "eval": {"sacrebleu": ("sacrebleu",), "rouge_score": ("rouge-score",)},
}
# Instructions that onnxruntime's kernels have fast paths for, as Linux calls them.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")


def command(as_json: Json = False) -> None:
    """Say what is installed and what this machine can do."""
    from gptedge import __version__

    value: dict[str, Any] = {
        "gptedge": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": _instructions(),
        "memory_gb": _memory_gb(),
        "free_disk_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "extras": {name: _versions(modules) for name, modules in _EXTRAS.items()},
        "providers": _providers(),
    }
    ok = bool(value["providers"])
    emit({**value, "ok": ok}, as_json=as_json, lines=_lines(value))
    if not ok:
        raise SystemExit(1)


def _versions(modules: dict[str, tuple[str, ...]]) -> dict[str, str | None]:
    return {module: _version(names) if util.find_spec(module) else None for module, names in modules.items()}


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _providers() -> list[str]:
    if not util.find_spec("onnxruntime"):
        return []
    from gptedge.runtime.onnx_runtime import import_onnxruntime

    return list(import_onnxruntime().get_available_providers())


def _instructions() -> list[str]:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in _INSTRUCTIONS if name in flags]


def _memory_gb() -> float | None:
    if not hasattr(os, "sysconf") or sys.platform == "darwin":
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def _lines(value: dict[str, Any]) -> list[str]:
    lines = [
        f"{key:13} {', '.join(v) if isinstance(v, list) else v}"
        for key, v in value.items()
        if key not in ("extras", "providers")
    ]
    for extra, modules in value["extras"].items():
        missing = [module for module, version in modules.items() if version is None]
        have = ", ".join(f"{module} {version}" for module, version in modules.items() if version)
        lines.append(
            f"{extra:13} {have}"
            if not missing
            else f"{extra:13} missing {', '.join(missing)}: pip install 'gptedge[{extra}]'"
        )
    lines.append(f"{'providers':13} {', '.join(value['providers']) or 'none: nothing can run'}")
    return lines
