"""One rank of tests/parallel/test_failure.py: ``failure_worker.py DEGREES SECONDS STEPS [KIND RANK STEP]``.

Trains a tiny model in the layout DEGREES (JSON) and prints its steps; rank RANK fails at the beginning of step STEP.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import ernie5  # noqa: F401  before paddle: it settles what Paddle reads when imported
from ernie5.config.schema import ParallelConfig
from ernie5.model import Ernie5Config
from ernie5.parallel.watchdog import Watchdog
from ernie5.parallel.worker import Worker
from ernie5.sequence.packing import collate
from tests.trainer.tiny_run import SHAPE, MadeUpRows


def turn_in_circles() -> None:
    while True:
        time.sleep(0.01)


def fail(kind: str, watchdog: Watchdog, seconds: float) -> None:
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "spin":
        turn_in_circles()
    if kind == "raise":
        raise KeyError("no such expert")
    if kind == "leave":
        sys.exit(0)
    if kind == "save":  # legitimate, and longer than the time-out
        watchdog.may_take_long("saving")
        time.sleep(2 * seconds)


def main() -> None:
    degrees, seconds, steps = json.loads(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    kind, who, when = sys.argv[4:7] if len(sys.argv) > 4 else ("", -1, -1)
    worker = Worker(Ernie5Config.from_model_config(SHAPE), ParallelConfig(**degrees, timeout_seconds=seconds))
    watchdog, rows = worker.topology.watchdog, MadeUpRows()
    worker.model.train()
    for step in range(1, steps + 1):
        watchdog.working_on(step)
        if (worker.topology.rank, step) == (int(who), int(when)):
            fail(kind, watchdog, seconds)
        first = step * 8 + worker.row_rank
        worker.forward_backward([collate([rows[first + i * worker.row_ranks]]) for i in range(2)])
        worker.model.clear_gradients()
        watchdog.may_take_long("")
        print("step", step, flush=True)


if __name__ == "__main__":
    main()
