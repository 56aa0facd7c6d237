"""The speed comparison: what a runner measures, and the table made of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peers
import pytest
import speed

from gptedge import load

RUNS = {
    "genai int4": [speed.Run(0.5, 0.1 * i, 2.0, [1] * 11, 1.0, None, 300.0) for i in (1, 2, 9)],
    "gptedge int4": [speed.Run(0.25, 0.1, 1.0, [1] * 11, 0.5, 0.1, 300.0)],
}


def test_our_runner(tiny_bundle: Path) -> None:
    prompt = list(range(20))
    tool = speed.Tool("gptedge_runner.py", speed.ours, lambda work: work)
    job = {"model": str(tiny_bundle), "prompt": prompt, "new": 8, "second": [1, 2], "threads": 1, "options": {}}
    run = speed.one_run(tool, job)
    with load(tiny_bundle, threads=1) as model:
        assert run.tokens == [i for c in model.stream_ids(prompt, max_tokens=8, temperature=0) for i in c.token_ids]
    assert run.second_s is not None
    assert 0 < run.second_s < run.cold_s
    assert 0 < run.load_s + run.first_s < run.cold_s
    assert run.peak_mb > 20


def test_a_runner_that_fails_says_why(tmp_path: Path) -> None:
    tool = speed.Tool("gptedge_runner.py", speed.ours, lambda work: work)
    with pytest.raises(peers.PeerError, match="does not exist"):
        speed.one_run(tool, {"model": str(tmp_path / "nothing"), "prompt": [1], "threads": 1})


def test_table_has_medians_and_ratios() -> None:
    lines = speed.table(RUNS, list(range(100))).splitlines()
    assert lines[0].startswith("| | load s | first token s | prefill tok/s | decode tok/s | copied | second turn s |")
    assert "| 0.5 (1.00×) | 0.2 (1.00×) | 500 (1.00×) | 5 (1.00×) | 0 |  | 1 (1.00×) | 300 (1.00×) |" in lines[2]
    assert "| 0.25 (0.50×) | 0.1 (0.50×) | 1e+03 (2.00×) | 10 (2.00×) | 0 | 0.1 | 0.5 (0.50×) |" in lines[3]


@pytest.mark.parametrize(
    ("tokens", "share"), [([5, 6, 7, 8], 1.0), ([5, 6, 7, 1], 0.75), ([9, 2, 3, 4], 0.0), ([9, 1, 2, 3, 4], 0.2)]
)
def test_share_of_a_reply_that_copies(tokens: list[int], share: float) -> None:
    assert speed.share_copied(tokens, [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]) == share


def test_unknown_names() -> None:
    command = [sys.executable, speed.__file__, "--tools", "gptedge int3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'gptedge int3' is not known" in done.stderr
