"""Training: text in, a Hugging Face checkpoint out. `run.run_training` is the way in; `config.TrainConfig` says how."""

import os
import time
from collections.abc import MutableMapping
from pathlib import Path

_LOOKS = 4
_SPINS = 10_000
"""Times that a waiting thread looks before it sleeps, of GNU OpenMP's 300,000."""


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


def settle_waiting(environment: MutableMapping[str, str]) -> None:
    """How threads wait for each other, unless `environment` says so: read by torch's thread library as it is loaded.

    They spin, since waking up takes a fifth to a half of training's speed. But a thread that spins keeps the processor
    from the one that it waits for where another program runs, and by itself the library spins long enough for a step
    to take 20 to 40 times as long: so not at all where others compute already, and a thirtieth of it, which alone costs
    nothing, in case that one begins later.
    """
    if "OMP_WAIT_POLICY" in environment or "GOMP_SPINCOUNT" in environment:
        return
    if others_compute():
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        environment["GOMP_SPINCOUNT"] = str(_SPINS)


settle_waiting(os.environ)
