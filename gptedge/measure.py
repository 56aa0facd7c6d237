"""Measuring this process: peak memory."""

from __future__ import annotations

import sys


def peak_rss_mb() -> float:
    """Most memory this process has held at once, MB (10^6 bytes); 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
