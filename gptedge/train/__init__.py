"""Training: text in, a Hugging Face checkpoint out. `run.run_training` is the way in; `config.TrainConfig` says how."""

import os
import time
from pathlib import Path

_LOOKS = 4


def others_compute(load: Path = Path("/proc/loadavg")) -> bool:
    """Whether other programs than this one have work at every look; where it cannot be seen, they may."""
    for _ in range(_LOOKS):
        try:
            running = int(load.read_text().split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):
            return True
        if running <= 1:
            return False
        time.sleep(0.01)
    return True


# Read by torch's thread library when it is loaded. Threads that wait for each other spin, and beside other programs'
# work on the same two cores a step took 2.2 to 6.3 s instead of 0.48 s; alone, threads that sleep cost 12 to 37%.
if "OMP_WAIT_POLICY" not in os.environ and others_compute():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
