"""Binds ranks to a core each, and keeps these awake while they wait for each other.

A core whose rank waits for a message halts. On a virtual machine the host takes it back, waking up takes up to a
millisecond, and what follows runs on cold caches at a low clock: two processes of ``nano`` lost a quarter of their
time (benchmarks/RESULTS.md). A thread of the lowest scheduling class (SCHED_IDLE) in each rank spins that time away.
It gives way at once to the threads of its own process alone: where Linux shares cores among sessions (autogroup,
cgroups), a session that does nothing but spin counts as much as one that computes. Hence the cores are divided.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ernie5 import environment
from ernie5.ops import kernels

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def keep(wanted: bool) -> bool:
    """Binds all threads of this process, and those to come, to its core, and starts the thread; whether it did.

    That is where the run has as many ranks on this host as it may use cores, where they compute with one thread each,
    and where no quota counts the time.
    """
    endpoints, cores = local_endpoints(), sorted(os.sched_getaffinity(0))
    if not wanted or len(endpoints) != len(cores) or os.environ.get("OMP_NUM_THREADS", "1") != "1" or limited():
        return False
    if not kernels.keep_awake():
        return False
    core = cores[endpoints.index(os.environ["PADDLE_CURRENT_ENDPOINT"])]
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread, {core})
    environment.use_cores()
    return True


def local_endpoints() -> list[str]:
    """Those of this run's ranks on this host, by the launcher's list of all."""
    host = os.environ["PADDLE_CURRENT_ENDPOINT"].rsplit(":", 1)[0]
    endpoints = os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")
    return [endpoint for endpoint in endpoints if endpoint.rsplit(":", 1)[0] == host]


def limited() -> bool:
    """Whether a cgroup this process is in has a quota of processor time (v2: "max" for none; v1: -1)."""
    for line in OWN_CGROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top, name = (CGROUPS / "cpu", "cpu.cfs_quota_us") if controllers else (CGROUPS, "cpu.max")
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            quota = folder / name
            if quota.is_file() and quota.read_text().split()[0] not in ("max", "-1"):
                return True
            if folder == top:
                break
    return False
