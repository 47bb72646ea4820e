"""Keeps the cores of ranks that wait for each other awake.

A core whose rank waits for a message halts. On a virtual machine the host takes it back, waking up takes up to a
millisecond, and what follows runs on cold caches at a low clock: two processes of ``nano`` lost a quarter of their
time (benchmarks/RESULTS.md). A thread of the lowest scheduling class (SCHED_IDLE) in each rank spins that time away; it
gives way at once to anything else that wants the core.
"""

from __future__ import annotations

import os
from pathlib import Path

from ernie5.ops import kernels

QUOTAS = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")


def keep(wanted: bool) -> bool:
    """Starts the thread where it helps, and returns whether it did.

    That is where this host has a rank for every core, so that a thread takes the idle time of its own rank and of no
    one else, and where no quota counts the time.
    """
    if not (wanted and local_ranks() >= len(os.sched_getaffinity(0)) and not limited()):
        return False
    kernels.keep_awake()
    return True


def local_ranks() -> int:
    """Ranks of this run on this host, by the launcher's list of all."""
    host = os.environ["PADDLE_CURRENT_ENDPOINT"].rsplit(":", 1)[0]
    endpoints = os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")
    return sum(endpoint.rsplit(":", 1)[0] == host for endpoint in endpoints)


def limited() -> bool:
    """Whether the container has a quota of processor time (cgroup v2: "max" for none; v1: -1)."""
    for path in QUOTAS:
        if path.exists():
            return path.read_text().split()[0] not in ("max", "-1")
    return False
