"""The far end of a contender's pipe: builds one contender and answers requests, one JSON line each.

    python -m benchmarks.worker MODULE CLASS SETTINGS [realtime]

It runs in the interpreter of whoever is measured, so it needs nothing but the standard library and NumPy.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REALTIME_PRIORITY = 10


class Contender:
    """What a benchmark measures. ``step`` is timed; the rest happens between the clocks."""

    def prepare(self, **case: Any) -> None:
        """Makes the inputs of a case that ``step`` works on; contenders of a single case have nothing to do."""

    def step(self) -> None:
        raise NotImplementedError

    def outputs(self) -> dict[str, np.ndarray]:
        """What the last step computed, as float arrays, for the comparison before timing."""
        raise NotImplementedError


class Server:
    """Requests on a contender. Each returns something JSON can carry."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender

    def prepare(self, **case: Any) -> None:
        self.contender.prepare(**case)

    def time(self, count: int = 1) -> list[float]:
        """Seconds of each of ``count`` steps."""
        gc.collect()
        gc.disable()
        try:
            return [self._timed_step() for _ in range(count)]
        finally:
            gc.enable()

    def _timed_step(self) -> float:
        start = time.perf_counter()
        self.contender.step()
        return time.perf_counter() - start

    def memory(self, count: int = 1) -> dict[str, int]:
        """Bytes of this process: ``before`` a step with all free memory returned, and ``peak`` during ``count``."""
        before = trimmed_bytes()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the highest value so far
        for _ in range(count):
            self.contender.step()
        return {"before": before, "peak": status_bytes("VmHWM")}

    def outputs(self, path: str) -> None:
        """Saves the outputs of one step."""
        self.contender.step()
        np.savez(path, **self.contender.outputs())

    def missing_kernels(self) -> str:
        """Why this project's compiled kernels do not serve here, if it is its process and they should; else empty."""
        kernels = sys.modules.get("ernie5.ops.kernels")
        return kernels.library().problem if kernels and not kernels.chosen_reference() else ""

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Any other method of the contender."""
        return getattr(self.contender, name)(**arguments)


def status_bytes(field: str) -> int:
    """A line of /proc/self/status, such as VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def trimmed_bytes() -> int:
    """Resident bytes after freed memory went back to the kernel, whatever the allocator was told to keep."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return status_bytes("VmRSS")


@contextlib.contextmanager
def scheduled_ahead():  # noqa: ANN201 (a context manager)
    """First-in-first-out scheduling for every thread of this process: no other one cuts in while it computes.

    Threads that meet at barriers lose far more than the time another process takes: one busy core, even at the lowest
    priority, was seen to slow a two-thread product down twentyfold.
    """
    set_policy(os.SCHED_FIFO, REALTIME_PRIORITY)
    try:
        yield
    finally:
        set_policy(os.SCHED_OTHER, 0)


def set_policy(policy: int, priority: int) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))


def serve(server: Server, requests: Any, answers: Any, ahead: Callable) -> None:
    for line in requests:
        request = json.loads(line)
        try:
            with ahead():
                answer = {"value": getattr(server, request["method"])(**request["arguments"])}
        except Exception as error:  # noqa: BLE001 (whatever a peer raises is its answer)
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    module, name, settings, *options = sys.argv[1:]
    ahead = scheduled_ahead if "realtime" in options else contextlib.nullcontext
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print what they like; it goes to the log
    try:
        with ahead():
            server = Server(getattr(importlib.import_module(module), name)(**json.loads(settings)))
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return
    print(json.dumps({"value": "ready"}), file=answers, flush=True)
    serve(server, sys.stdin, answers, ahead)


if __name__ == "__main__":
    main()
