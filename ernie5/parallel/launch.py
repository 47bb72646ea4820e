"""Several processes on this machine, for tests and benchmarks: free ports, output by rank, a certain end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

POLL_SECONDS = 0.05
LAST_LINES = 25
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here, not between fork and exec


class LaunchError(RuntimeError):
    """A process failed or the time ran out; the message holds the last lines of every rank."""


def launch(
    command: Sequence[str],
    ranks: int,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> list[str]:
    """Runs ``command`` as ``ranks`` processes over gloo and returns what each printed, both streams together.

    ``environment`` joins this process's. Every process is gone when this returns or raises; with the first that fails,
    or after ``timeout`` seconds, all are killed and ``LaunchError`` shows each rank's last lines, tagged with its rank.
    ``folder`` keeps their output as ``rank-N.log``.
    """
    with tempfile.TemporaryDirectory() as temporary:
        logs = [Path(folder or temporary) / f"rank-{rank}.log" for rank in range(ranks)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        endpoints = [f"127.0.0.1:{port}" for port in _free_ports(ranks + 1)]
        processes = []
        try:
            for rank, log in enumerate(logs):
                own = {**variables, **_variables(rank, endpoints[1:], endpoints[0])}
                with log.open("wb") as output:
                    processes.append(_start(command, own, output))
            problem = _wait(processes, timeout)
        finally:
            for process in processes:
                _kill(process)
        outputs = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    if problem:
        raise LaunchError(f"{problem}\n{_tagged(outputs)}")
    return outputs


def _start(command: Sequence[str], environment: Mapping[str, str], output: BinaryIO) -> subprocess.Popen:
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output, preexec_fn=in_own_session)


def in_own_session() -> None:
    """In a new process, before its program: a session of its own, and the kernel kills it with its parent (Linux)."""
    os.setsid()
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _variables(rank: int, endpoints: list[str], master: str) -> dict[str, str]:
    """What ``paddle.distributed.launch --backend gloo`` sets."""
    return {
        "PADDLE_DISTRI_BACKEND": "gloo",
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_RANK_IN_NODE": str(rank),
        "PADDLE_TRAINERS_NUM": str(len(endpoints)),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_MASTER": master,
    }


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _wait(processes: list[subprocess.Popen], timeout: float) -> str:
    """Returns when all have ended well, with "", or says what went wrong."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return f"rank {rank} of {len(codes)} ended with code {code}"
        if None not in codes:
            return ""
        time.sleep(POLL_SECONDS)
    running = [str(rank) for rank, process in enumerate(processes) if process.poll() is None]
    return f"after {timeout:.0f} s rank {', '.join(running)} of {len(processes)} had not ended"


def _kill(process: subprocess.Popen) -> None:
    """Ends the process and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tagged(outputs: list[str]) -> str:
    return "\n".join(
        f"[rank {rank}] {line}" for rank, text in enumerate(outputs) for line in text.splitlines()[-LAST_LINES:]
    )
