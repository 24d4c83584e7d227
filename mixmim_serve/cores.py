"""How many cores this process may use: its CPU affinity and the CPU quotas of its cgroups both count.

`os.cpu_count` counts the host's, which in a container limited to two of 64 would start 64 threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_SIBLINGS = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")


def usable_cores() -> int:
    """Logical CPUs that this process may use: the size of a pool of decoding threads."""
    return _within_quota(_allowed())


def physical_cores() -> int:
    """Physical cores that this process may use: threads that compute gain nothing from a core's second thread."""
    return _within_quota(max(1, _allowed() // _threads_per_core()))


def _allowed() -> int:
    """Logical CPUs in the affinity mask, which `taskset`, Slurm and `docker --cpuset-cpus` set."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _within_quota(cores: int) -> int:
    """At most as many as the cgroups allow, rounded up; a limit of an ancestor holds for this process too."""
    limits = [limit for folder in _cgroup_folders() if (limit := _limit(folder)) is not None]
    return min(cores, *(math.ceil(limit) for limit in limits)) if limits else cores


def _cgroup_folders() -> Iterator[Path]:
    """This process's cgroup and its ancestors, as far as they are visible here; in version 1 those that limit CPUs."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux, or hidden
        lines = ["0::/"]
    for line in lines:  # "0::/path" in version 2, "4:cpu,cpuacct:/path" in version 1
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / "cpu" if controllers else _CGROUPS
        own = PurePosixPath(path.lstrip("/"))
        if ".." in own.parts:  # outside of this cgroup namespace
            own = PurePosixPath()
        yield from (root / folder for folder in (own, *own.parents))


def _limit(folder: Path) -> float | None:
    """CPUs that one cgroup allows: `cpu.max` in version 2, `cpu.cfs_quota_us` in version 1; None without a limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return None


def _threads_per_core() -> int:
    """2 with hyper-threading."""
    try:
        siblings = _SIBLINGS.read_text()
        first, _, last = siblings.strip().partition("-")
        return int(last) - int(first) + 1 if last else siblings.count(",") + 1
    except (OSError, ValueError):
        return 1
