"""Starts the ranks of this host through Paddle's launcher, and starts them again when they fail.

Paddle 3.3.1 restarts by itself only where an etcd server keeps the hosts together (``CollectiveElasticController``);
``--max_restart`` and ``--elastic_level`` do nothing otherwise. So each attempt here is one run of its collective
controller (rendezvous of the hosts, devices, environment, logs), and what surrounds it is ours: nothing of an attempt
is left when it has ended, stopped processes included, nor when the launcher itself is killed (Linux).
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from paddle.distributed.launch.context import Context
from paddle.distributed.launch.context.status import Status
from paddle.distributed.launch.controllers.collective import CollectiveController
from paddle.distributed.launch.job import container
from paddle.distributed.launch.utils.process_context import ProcessContext

from ernie5.parallel.launch import in_own_session
from ernie5.parallel.watchdog import MARK, REFUSED

POLL_SECONDS = 0.2
LEAVE_SECONDS = 10.0  # in which the ranks end by themselves, each with its reason, when one has failed
LAST_LINES = 15
LAST_BYTES = 1 << 16
ONCE = ("--fresh",)  # arguments of the script that would undo what the earlier attempts did


class Run(NamedTuple):
    """What is started: Paddle's options and the script with its arguments; and what is known of its progress."""

    options: list[str]
    script: list[str]
    log_dir: str
    reached: Callable[[], int | None]  # the last step in its log
    goes_on: Callable[[], str]  # from where a restart goes on, in words


class Attempt(CollectiveController):
    """All ranks of this host, once. ``codes``: how they ended, negative by a signal, None: killed here."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.codes: list[int | None] = []
        self.begins: list[int] = []  # where the attempt begins in each log
        self.told_to_end = 0  # exit code that a signal to the launcher asks for

    def deploy_pod(self) -> None:
        self.begins = [os.path.getsize(c.outfile) if os.path.exists(c.outfile) else 0 for c in self.pod.containers]
        super().deploy_pod()

    def watch(self) -> bool:
        """Until all have ended, or one has failed and the others have had time to. Whether all ended well."""
        leave = None
        while True:
            self.codes = [one.exit_code for one in self.pod.containers]
            self.show_logs()
            if leave is None and any(self.codes):
                leave = time.monotonic() + LEAVE_SECONDS
            if None not in self.codes or (leave is not None and time.monotonic() > leave):
                break
            time.sleep(POLL_SECONDS)
        self.kill()
        self.show_logs()
        return not any(code != 0 for code in self.codes)

    def show_logs(self) -> None:
        """What the first rank has written since; Paddle reads it and swallows every exception, SystemExit too."""
        self.pod.logs()
        if self.told_to_end:
            sys.exit(self.told_to_end)

    def kill(self) -> None:
        """The ranks and whatever they started, running or stopped."""
        for one in self.pod.containers:
            if one._proc is not None and one._proc._proc is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one._proc._proc.pid, signal.SIGKILL)
                one._proc._proc.wait()
        self.master.stop()

    def signal_handler(self, number: int, frame: FrameType | None) -> NoReturn:
        self.told_to_end = 128 + number
        sys.exit(self.told_to_end)

    def reasons(self) -> list[str]:
        """Why it failed, for a user who has seen the first rank's output: the line of a watchdog, or the last words."""
        texts = [_last(Path(c.outfile), begin) for c, begin in zip(self.pod.containers, self.begins, strict=True)]
        marked = [[line for line in text.splitlines() if line.startswith(MARK)] for text in texts]
        said = []
        for number, (code, lines) in enumerate(zip(self.codes, marked, strict=True)):
            name = f"rank {self.pod.containers[number].env['PADDLE_TRAINER_ID']}"
            if code and not lines and code > 0 and number:
                said += [f"[{name}] {line}" for line in texts[number].splitlines()[-LAST_LINES:]]
            if code and not any(marked):
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                said.append(f"{MARK[:-5]}{name} {how}")
        if any(marked) and not marked[0]:
            said.append(next(lines for lines in marked if lines)[0])
        return said


def run(what: Run, max_restarts: int) -> int:
    """Runs to the end, with at most ``max_restarts`` further attempts. Returns the exit code.

    There is no further one when a rank refused its input, or when two attempts in a row failed at the same step.
    """
    sys.argv = ["launch", "--log_dir", what.log_dir, "--log_level", "ERROR", *what.options, *what.script]
    context = Context()
    if context.is_legacy_mode() or (context.args.master or "").startswith("etcd:"):
        found = " ".join(context.unknown_args) or "--legacy or an etcd master"
        raise ValueError(
            f"Paddle's launcher takes {found} only in modes that have no restarts here; leave it out (without a GPU "
            "the backend is gloo anyway), or use python -m paddle.distributed.launch"
        )
    container.ProcessContext = functools.partial(ProcessContext, preexec_fn=in_own_session)
    job, before = context.args.job_id, None
    for attempt in range(max_restarts + 1):
        context.status, context.args.job_id = Status(), f"{job}.{attempt}"  # hosts of the same attempt meet
        began, trial = time.monotonic(), Attempt(context)
        try:
            trial.run()
        finally:
            trial.kill()
        if not any(code != 0 for code in trial.codes):
            return 0
        for line in trial.reasons():
            print(line, file=sys.stderr)
        reached = what.reached()
        end = f"attempt {attempt + 1} failed after {time.monotonic() - began:.0f} s"
        end += "" if reached is None else f" in step {reached + 1}"
        logs = f"the ranks' output: {context.args.log_dir}/workerlog.*"
        if REFUSED in trial.codes:
            return REFUSED
        if attempt and reached is not None and reached == before:
            print(f"launch: {end}, as the one before: starting again would not help; {logs}", file=sys.stderr)
            break
        if attempt == max_restarts:
            print(f"launch: {end}; no restart is left of --max_restarts {max_restarts}; {logs}", file=sys.stderr)
            break
        print(f"launch: {end}; restart {attempt + 1} of {max_restarts}, {what.goes_on()}; {logs}", file=sys.stderr)
        before = reached
        context.args.training_script_args = [a for a in context.args.training_script_args if a not in ONCE]
    return next((code if code > 0 else 128 - code for code in trial.codes if code), 1)


def _last(path: Path, begin: int) -> str:
    """The end of a log, no earlier than ``begin``."""
    with path.open("rb") as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - LAST_BYTES))
        return file.read().decode("utf-8", "replace")
