"""Ranks have a core each and keep it awake while they wait, where that costs nobody anything."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from ernie5 import environment
from ernie5.ops import kernels
from ernie5.parallel import awake

IDLE_CLASS = 5  # SCHED_IDLE


def idle_threads() -> dict[int, int]:
    """Clock ticks of the threads of this process that run in the lowest scheduling class."""
    found = {}
    for path in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            values = (path / "stat").read_text().rsplit(")", 1)[1].split()
            if int(values[38]) == IDLE_CLASS:
                found[int(path.name)] = int(values[11])
    return found


@pytest.mark.skipif(kernels.library().path is None, reason="no compiled kernels on this machine")
def test_one_thread_of_the_lowest_class_spins_until_told_to_end():
    assert idle_threads() == {}
    try:
        kernels.keep_awake()
        kernels.keep_awake()
        for _ in range(100):
            time.sleep(0.1)
            if sum(idle_threads().values()) > 1:
                break
        assert len(idle_threads()) == 1 and sum(idle_threads().values()) > 1
    finally:
        kernels.keep_awake(False)
    for _ in range(100):
        time.sleep(0.05)
        if not idle_threads():
            break
    assert idle_threads() == {}


@pytest.mark.parametrize(
    ("here", "elsewhere", "quotas", "threads", "wanted", "starts"),
    [
        (2, 0, {"cpu.max": "max 100000"}, "1", True, True),
        (2, 2, {}, "1", True, True),
        (2, 0, {"cpu/cpu.cfs_quota_us": "-1"}, None, True, True),
        (2, 0, {"memory/cpu.max": "150000 100000"}, "1", True, True),
        (2, 0, {}, "1", False, False),
        (2, 0, {}, "2", True, False),
        (1, 0, {}, "1", True, False),
        (1, 3, {}, "1", True, False),
        (4, 0, {}, "1", True, False),
        (2, 0, {"cpu.max": "200000 100000"}, "1", True, False),
        (2, 0, {"jobs/cpu.max": "150000 100000"}, "1", True, False),
        (2, 0, {"jobs/one/cpu.max": "150000 100000", "cpu.max": "max 100000"}, "1", True, False),
        (2, 0, {"cpu/cpu.cfs_quota_us": "150000"}, "1", True, False),
        (2, 0, {"cpu/box/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_quota_us": "-1"}, "1", True, False),
    ],
)
def test_only_with_a_core_for_every_rank_and_without_a_quota(
    here: int,
    elsewhere: int,
    quotas: dict[str, str],
    threads: str | None,
    wanted: bool,
    starts: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoints = [f"10.0.0.1:{7000 + i}" for i in range(here)] + [f"10.0.0.2:{7000 + i}" for i in range(elsewhere)]
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", endpoints[here - 1])
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", ",".join(endpoints))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    monkeypatch.setattr(awake, "CGROUPS", tmp_path)
    monkeypatch.setattr(awake, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("4:memory:/far\n2:cpu,cpuacct:/box\n0::/jobs/one\n")
    for name, quota in quotas.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(quota + "\n")
    started, bound = [], set()
    monkeypatch.setattr(kernels, "keep_awake", lambda: started.append(1) or True)
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cores: bound.add((thread, *cores)))
    monkeypatch.setattr(environment, "use_cores", lambda: None)
    assert awake.keep(wanted) is starts and started == [1] * starts
    assert bound >= {(os.getpid(), 5)} if starts else not bound
