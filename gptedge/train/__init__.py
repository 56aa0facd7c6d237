"""Training: text in, a Hugging Face checkpoint out. `run.run_training` is the way in; `config.TrainConfig` says how."""

import os

# Read by torch's thread library when it is loaded. Without it, threads that wait for each other spin, and beside other
# programs' work on the same two cores a step took 2.2 to 6.3 s instead of 0.48 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
