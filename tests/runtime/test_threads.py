"""Physical cores, and threads that sleep when nothing is computed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gptedge
from gptedge.runtime.threads import _mac, _windows, cgroup_cores, default_threads, physical_cores


def machine(at: Path, siblings: list[str]) -> Path:
    for number, text in enumerate(siblings):
        folder = at / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    return at


@pytest.mark.parametrize(
    ("siblings", "usable", "cores"),
    [
        (["0-1", "0-1", "2-3", "2-3"], range(4), 2),
        (["0,4", "1,5", "2,6", "3,7"] * 2, range(8), 4),
        (["0,4", "1,5", "2,6", "3,7"] * 2, [0, 1, 4], 2),  # an affinity
        (["0", "1"], range(2), 2),
        (["0-1", "0-1", "2", "3"], range(4), 3),  # fast cores with two threads, slow ones with one
        (["0-1", "0-1"], range(4), 3),  # two of which nothing is said
    ],
)
def test_hyper_threads_do_not_count(tmp_path: Path, siblings: list[str], usable: list[int], cores: int) -> None:
    assert physical_cores(usable, machine(tmp_path, siblings)) == cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "nonsense\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_share_of_a_container(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_cores(tmp_path) == cores


def test_default_is_within_this_machine() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)


@pytest.mark.skipif(os.name != "nt", reason="asks Windows")
def test_windows_tells() -> None:
    assert 1 <= _windows() <= (os.cpu_count() or 1)


def test_mac_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["", "6\n"])

    def run(*_: object, **__: object) -> object:
        return type("Done", (), {"stdout": next(answers)})

    monkeypatch.setattr("gptedge.runtime.threads.subprocess.run", run)
    assert _mac() == 6


def test_idle_model_uses_no_processor_time(tiny_bundle: Path) -> None:
    """Threads that went on spinning would use 40 ms after each of the ten runs, however busy the machine is."""
    model = gptedge.load(tiny_bundle, threads=2)
    cache = model.session.new_cache()
    model.session.prefill([5] * 20, cache)
    idle = 0.0
    for _ in range(10):
        model.session.run([5], cache)
        before = time.process_time()
        time.sleep(0.05)
        idle += time.process_time() - before
    assert idle < 0.1


LEAVING = """
import sys, threading, time, gptedge
model = gptedge.load(sys.argv[1], threads=2)
ask = lambda: [model.generate("The", max_tokens=200, seed=i) for i in range(1000)]
for _ in range(3):
    threading.Thread(target=ask, daemon=True).start()
time.sleep(0.2)
"""


def test_a_program_may_end_while_daemons_generate(tiny_bundle: Path) -> None:
    """Of a thread that dies within onnxruntime, the whole process would."""
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", LEAVING, tiny_bundle], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
