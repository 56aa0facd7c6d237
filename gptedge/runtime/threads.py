"""How many threads to compute on: one for each physical core that this process may use.

Two hyper-threads share one core's arithmetic units, which matrix products keep busy alone. A container's share of
processor time (cgroups) bounds the number too: threads beyond it would wait for one another while suspended.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from math import ceil
from pathlib import Path

from gptedge.errors import UsageError

_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_ALWAYS_ALLOWED = 16
"""Threads that may be asked for on any machine: a program written for a larger one runs on a smaller one too."""


def default_threads() -> int:
    """Physical cores that this process may use; at least 1."""
    cores = _COUNTS.get(sys.platform, _half)()
    return max(1, min(cores, cgroup_cores(_CGROUPS) or cores))


def checked_threads(threads: object, name: str = "threads") -> int:
    """A number of threads. Raises UsageError where it is none, or so large that starting them would take minutes."""
    most = max(_ALWAYS_ALLOWED, os.cpu_count() or 1)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most:
        raise UsageError(f"{name} is {threads!r}; it must be a whole number from 1 to {most}")
    return threads


def _linux() -> int:
    return physical_cores(os.sched_getaffinity(0), _CPUS) if hasattr(os, "sched_getaffinity") else _half()


def physical_cores(usable: Iterable[int], cpus: Path) -> int:
    """How many cores the logical processors `usable` belong to, as `cpus` (/sys/devices/system/cpu) tells.

    One that it does not describe counts as a core of its own.
    """
    cores = set()
    for number in usable:
        topology = cpus / f"cpu{number}" / "topology"
        try:
            cores.add((topology / "thread_siblings_list").read_text())
        except OSError:
            cores.add(str(number))
    return len(cores)


def cgroup_cores(root: Path) -> int | None:
    """The cores' worth of time that a container may use, rounded up; None without a bound. Version 2, then 1."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((root / "cpu" / f"cpu.cfs_{part}_us").read_text().strip() for part in ("quota", "period"))
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or not int(quota) * int(period):  # "max", -1
        return None
    return ceil(int(quota) / int(period))


def _mac() -> int:
    """Fast cores where there are two kinds: the slow ones would hold the others up."""
    for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
        if done.stdout.strip().isdigit():
            return int(done.stdout)
    return _half()


def _windows() -> int:
    """Entries of kind 0 (a core) among those that GetLogicalProcessorInformation lists."""
    import ctypes

    class Entry(ctypes.Structure):
        _fields_ = (("mask", ctypes.c_size_t), ("kind", ctypes.c_int), ("rest", ctypes.c_ulonglong * 2))

    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]  # Windows alone has it
    size = ctypes.c_ulong(0)
    kernel.GetLogicalProcessorInformation(None, ctypes.byref(size))
    entries = (Entry * (size.value // ctypes.sizeof(Entry)))()
    if not kernel.GetLogicalProcessorInformation(entries, ctypes.byref(size)):
        return _half()
    return sum(entry.kind == 0 for entry in entries)


def _half() -> int:
    """Where nothing tells: as if every core had two threads."""
    return ceil((os.cpu_count() or 1) / 2)


_COUNTS = {"linux": _linux, "darwin": _mac, "win32": _windows}
