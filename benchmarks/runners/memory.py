"""Peak resident memory of this process, for runners whose environments have no gptedge."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_mb() -> float:
    """10^6 bytes. Linux's getrusage would count what the program that started this one held when it did."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
