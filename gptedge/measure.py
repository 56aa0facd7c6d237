"""Measuring this process: peak memory."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_rss_mb() -> float:
    """Most memory this process has held at once, MB (10^6 bytes); 0 where the system does not tell."""
    # getrusage would count what the program that started this one held when it did.
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    if peak is not None:
        return round(peak * 1024 / 1e6, 1)
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def give_back_freed() -> None:
    """Memory that was freed goes back to the system, where the C library would keep it for later."""
    if sys.platform != "linux":
        return
    import ctypes

    with suppress(OSError, AttributeError):  # another library than glibc
        ctypes.CDLL(None).malloc_trim(0)
