"""Peak memory is this process's own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from gptedge.measure import peak_rss_mb


def test_what_a_process_holds_counts_and_not_what_its_parent_held() -> None:
    held = np.ones(40_000_000)  # 320 MB
    assert peak_rss_mb() > 320
    program = "from gptedge.measure import peak_rss_mb; print(peak_rss_mb())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 5 < float(child.stdout) < 150
    assert held[0] == 1
