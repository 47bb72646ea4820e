"""A rank that dies, stops, hangs or gives up ends the others with one line; one that is only slow does not."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ernie5.parallel import launch
from ernie5.parallel.blame import Seen, Wait, judge

WORKER = Path(__file__).with_name("failure_worker.py")
SECONDS = 4.0  # the time-out of the runs
CALL = re.compile(r" in \w+ (over ranks 0, 1|(from|to) rank [01])")  # what the survivor was waiting in
OVERLAPPED = {"expert": 2, "dispatcher": "all_to_all_overlapped"}


@contextmanager
def ranks(folder: Path, *arguments: str) -> Iterator[tuple[list, list[Path]]]:
    """Two ranks of ``failure_worker.py`` and their logs."""
    first, *endpoints = [f"127.0.0.1:{port}" for port in launch._free_ports(3)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    logs, processes = [folder / f"rank-{rank}.log" for rank in range(2)], []
    try:
        for rank, log in enumerate(logs):
            own = {**variables, **launch._variables(rank, endpoints, first)}
            with log.open("wb") as output:
                processes.append(launch._start([sys.executable, str(WORKER), *arguments], own, output))
        yield processes, logs
    finally:
        for process in processes:
            launch._kill(process)


def wait_for(text: str, log: Path, seconds: float = 120) -> float:
    """When ``text`` is in the log."""
    end = time.monotonic() + seconds
    while text not in log.read_text():
        assert time.monotonic() < end, f"no {text!r} in {log.read_text()}"
        time.sleep(0.02)
    return time.monotonic()


def lines(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("ernie5: rank ")]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "who", "call"),
    [({}, 1, "all_reduce over ranks 0, 1"), (OVERLAPPED, 0, ""), ({"pipeline": 2}, 0, "")],
    ids=["data", "experts", "pipeline"],
)
def test_the_others_of_a_killed_rank_name_it_within_seconds(tmp_path, degrees, who, call):
    with ranks(tmp_path, json.dumps(degrees), "100", "1000000") as (processes, logs):
        wait_for("step 5", logs[1 - who])
        processes[who].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert processes[1 - who].wait(30) == 75
        assert time.monotonic() - killed < 20  # of a time-out of 100
    (said,) = lines(logs[1 - who])
    assert f"rank {who} on {socket.gethostname()} (pid {processes[who].pid}) is gone without a word" in said
    assert f"rank {1 - who} on" in said and CALL.search(said)
    assert call in said and " in step " in said
    assert "Traceback" not in logs[1 - who].read_text()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "kind", "who", "why"),
    [
        ({"pipeline": 2}, "stop", 1, "has given no sign of life for"),
        (OVERLAPPED, "stop", 0, "has given no sign of life for"),
        ({}, "spin", 1, "did not come: it is at tests/parallel/failure_worker.py:2"),
        ({}, "raise", 1, "ended with KeyError: 'no such expert'"),
        ({}, "leave", 1, "has ended while others still need it"),
    ],
)
def test_a_rank_that_hangs_or_gives_up_ends_the_others_and_is_named(tmp_path, degrees, kind, who, why):
    seconds = str(SECONDS if kind in ("stop", "spin") else 100.0)
    with ranks(tmp_path, json.dumps(degrees), seconds, "1000000", kind, str(who), "5") as (processes, logs):
        stuck = wait_for("step 4", logs[1 - who])
        assert processes[1 - who].wait(60) == 75
        took = time.monotonic() - stuck
        (said,) = lines(logs[1 - who])
        assert f"rank {who} on {socket.gethostname()} (pid {processes[who].pid}) {why}" in said
        assert CALL.search(said)
        assert took < 50
        if kind in ("stop", "spin"):
            assert took >= SECONDS
        if kind == "spin":
            assert "in turn_in_circles; " in said
            assert processes[who].wait(10) == 75 and lines(logs[who])
        if kind == "raise":
            processes[who].wait(20)
            assert logs[who].read_text().rstrip().endswith("KeyError: 'no such expert'")


@pytest.mark.dist
@pytest.mark.slow
def test_saving_for_longer_than_the_time_out_does_not_end_the_run(tmp_path):
    with ranks(tmp_path, "{}", str(SECONDS), "6", "save", "0", "3") as (processes, logs):
        assert [process.wait(240) for process in processes] == [0, 0], logs[1].read_text()


# ------------------------------------------------------------------------------------------------ who is to blame


def seen(rank: int, waits: list[Wait] | None = None, **more: object) -> Seen:
    return Seen(rank, f"host{rank}", 100 + rank, waits or [], **more)


def reduce_over(*group: int, number: int = 1, seconds: float = 20.0, ends: bool = True) -> Wait:
    return Wait("all_reduce", str(group), group, number, seconds, ends)


@pytest.mark.parametrize(
    ("states", "who", "why"),
    [
        ([seen(0, [reduce_over(0, 1)]), seen(1, where="loader.py:3 in read")], 1, "loader.py:3 in read"),
        ([seen(0, [reduce_over(0, 1, seconds=5)]), seen(1)], None, ""),
        ([seen(0, [reduce_over(0, 1)]), seen(1, slow="saving")], None, ""),
        ([seen(0, [reduce_over(0, 1, seconds=61)]), seen(1, slow="saving")], 1, "saving"),
        ([seen(0, [reduce_over(0, 1, seconds=0.1)]), seen(1, ended=True)], 1, "has ended"),
        ([seen(0, [reduce_over(0, 1)]), seen(1, counts={"(0, 1)": 1}, silent=30.0)], 1, "no sign of life"),
        ([seen(0, [reduce_over(0, 1)]), seen(1, [reduce_over(1, 2)]), seen(2)], 2, "did not come"),
        ([seen(0, [reduce_over(0, 1)]), seen(1, slow="", normal=2.0)], None, ""),
        ([seen(rank, [reduce_over(0, 1)], counts={"(0, 1)": 1}) for rank in (0, 1)], 0, "nothing moves"),
        ([seen(0, [reduce_over(0, 1)]), seen(1, [reduce_over(0, 1, seconds=1)], counts={"(0, 1)": 1})], None, ""),
        ([seen(rank, [reduce_over(0, 1, ends=False)], counts={"(0, 1)": 1}) for rank in (0, 1)], None, ""),
        ([seen(0, [reduce_over(0, 1)]), seen(1, [Wait("barrier", "b", (0, 1), 1, 19.0)])], 1, "is in barrier over"),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_the_blame_goes_to_who_waits_for_nobody(states, who, why):
    verdict = judge({state.rank: state for state in states}, 10.0)
    assert (verdict.rank if verdict else None) == who
    assert not verdict or why in verdict.why
