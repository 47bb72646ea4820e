"""Ranks that wait keep their cores awake, where that costs nobody anything."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ernie5.ops import kernels
from ernie5.parallel import awake

IDLE_CLASS = 5  # SCHED_IDLE


def idle_threads() -> dict[int, int]:
    """Clock ticks of the threads of this process that run in the lowest scheduling class."""
    found = {}
    for path in Path("/proc/self/task").iterdir():
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
    ("here", "elsewhere", "quota", "wanted", "starts"),
    [
        (2, 0, "max 100000", True, True),
        (3, 0, None, True, True),
        (2, 0, "-1", True, True),
        (2, 0, "max 100000", False, False),
        (1, 0, "max 100000", True, False),
        (1, 3, "max 100000", True, False),
        (2, 0, "200000 100000", True, False),
        (2, 0, "150000", True, False),
    ],
)
def test_only_with_a_rank_for_every_core_and_without_a_quota(
    here: int,
    elsewhere: int,
    quota: str | None,
    wanted: bool,
    starts: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoints = [f"10.0.0.1:{7000 + i}" for i in range(here)] + [f"10.0.0.2:{7000 + i}" for i in range(elsewhere)]
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", endpoints[0])
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", ",".join(endpoints))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(awake, "QUOTAS", (tmp_path / "none", tmp_path / "quota"))
    if quota is not None:
        (tmp_path / "quota").write_text(quota + "\n")
    calls = []
    monkeypatch.setattr(kernels, "keep_awake", lambda: calls.append(1))
    assert awake.keep(wanted) is starts and calls == [1] * starts
