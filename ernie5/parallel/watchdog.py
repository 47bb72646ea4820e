"""The watchdog: a thread in every rank that ends the whole run, with one line, when a rank dies or hangs.

Rank 0 listens; every other rank keeps a connection to it and says about once a second in which collective it is
(``calls``), in which step and where its main thread stands. A connection that ends without a good-bye is a rank that
died: known at once, whatever the others do. When a rank waits too long in a collective, rank 0 finds out for whom
(``blame``) and tells all; if it is rank 0 that dies or falls silent, each of the others sees that by itself. Nothing
here goes through Paddle, whose stores and groups may be what hangs.

Ranks end with the code ``LOST``, or with 2 where a rank refused its input, which trying again would not mend.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import selectors
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from ernie5.parallel.blame import ALLOWANCE, Seen, Verdict, Wait, judge

LOST = 75  # exit code of a rank that ends because of another; EX_TEMPFAIL of sysexits.h: trying again may help
REFUSED = 2  # exit code of bad input
MARK = "ernie5: rank "  # every line of the watchdog begins so
INTERVAL = 1.0  # seconds between two signs of life, up to HEARD ranks
HEARD = 256  # ranks that rank 0 hears each INTERVAL; with more the signs come less often
SILENCE = 5  # intervals without a sign of life after which a rank counts as silent
GRACE = 5.0  # seconds in which the reason of a broken collective must become known
STARTING = "starting"
_BROKEN = re.compile(r"gloo|nccl|connection|socket|timeout|timed out|broken pipe", re.IGNORECASE)
_CALLS = str(Path(__file__).with_name("calls.py"))
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})

Exchange = Callable[[str | None], str]  # address of rank 0's socket, or None to ask -> that address


class Watchdog(threading.Thread):
    """One rank's. ``seconds``: how long a rank may keep others waiting; ``exchange`` tells rank 0's address to all."""

    def __init__(self, rank: int, ranks: int, host: str, seconds: float, exchange: Exchange) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.ranks, self.seconds = rank, ranks, seconds
        self.interval = min(INTERVAL * max(1.0, ranks / HEARD), seconds / 4)
        self.me = Seen(rank, socket.gethostname(), os.getpid(), slow=STARTING)
        self.waits: Callable[[], list[Wait]] = list
        self.counts: dict[str, int] = {}
        self.leaving = False  # this rank ends by itself and has said, or is saying, why
        self.concluding = threading.Lock()  # held for good by the thread that ends the process
        self.sending = threading.Lock()
        self.normal_since = time.monotonic()
        self._connect(host, exchange)
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self._goodbye)
        self.usual_hook, sys.excepthook = sys.excepthook, self._uncaught

    # ------------------------------------------------------------------ what the rest of the program tells it

    def working_on(self, step: int) -> None:
        """Step ``step`` begins. The first one may take long, as what comes before it may."""
        self.me.step = step
        if self.me.slow != STARTING:
            self.may_take_long("")

    def may_take_long(self, what: str) -> None:
        """Until the next step begins the others may have to wait ``ALLOWANCE`` times as long; "" takes it back."""
        if self.me.slow != what:
            self.me.slow, self.normal_since = what, time.monotonic()
            self.show()  # at once: a rank that is stopped says nothing later

    def broken(self, call: object, error: Exception) -> None:
        """A collective of this rank failed. Ends the process if a lost rank or connection is why; else returns."""
        if self.leaving or not _BROKEN.search(str(error)):
            return
        time.sleep(GRACE)  # the watchdog ends the process as soon as it knows who is gone
        reason = " ".join(str(error).split())
        self.conclude(Verdict(self.rank, f"lost its connection to another rank: {reason[-200:]}"))

    def last_words(self, words: str, code: int = LOST) -> None:
        """This rank ends because of ``words``, which it has shown itself; the others end with ``code`` and quote it."""
        self.leaving = True
        self.tell(Verdict(self.rank, f"ended with {' '.join(words.split())[:400]}", code=code))

    # ------------------------------------------------------------------ ending

    def conclude(self, verdict: Verdict, culprit: Seen | None = None) -> None:
        """Prints the line, tells the others and ends this process; unless it is ending for a reason of its own."""
        if self.leaving:
            return
        self.concluding.acquire()  # a second thread waits here for its end
        line = self._line(verdict, culprit or (self.me if verdict.rank == self.rank else Seen(verdict.rank)))
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            sys.stdout.flush()
        os.write(2, f"\n{line}\n".encode())
        self.tell(verdict)
        os._exit(verdict.code or LOST)

    def _line(self, verdict: Verdict, culprit: Seen) -> str:
        end = time.monotonic() + 1.0
        while not (mine := [w for w in self.waits() if verdict.rank in w.ranks]) and time.monotonic() < end:
            if verdict.waiting or verdict.rank == self.rank:
                break
            time.sleep(0.02)
        waiting = verdict.waiting
        if mine and not waiting and verdict.rank != self.rank:
            waiting = f"rank {self.rank} on {self.me.host} is in {mine[0]}"
        elif not waiting:
            waiting = f"rank {self.rank} on {self.me.host} is at {where()}"
        step = f" in step {self.me.step}" if self.me.step else ""
        return f"{MARK}{str(culprit)[5:]} {verdict.why}; {waiting}{step}. {self._remedy(verdict)}"

    def _remedy(self, verdict: Verdict) -> str:
        if verdict.code == REFUSED:
            return "All ranks end"
        if "did not come" in verdict.why or "nothing moves" in verdict.why:
            return (
                f"All ranks end after parallel.timeout_seconds = {self.seconds:g}; raise it if this may take so long, "
                "or start again: the run goes on from its last checkpoint"
            )
        return "All ranks end; start again, as tools/launch.py does: the run goes on from its last checkpoint"

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.leaving = True
        self.usual_hook(kind, error, trace)
        text = str(error).strip().splitlines()
        self.last_words(f"{kind.__name__}: {text[-1] if text else ''}")

    # ------------------------------------------------------------------ what rank 0 and the others do differently

    def _connect(self, host: str, exchange: Exchange) -> None:
        raise NotImplementedError

    def show(self) -> None:
        """A sign of life, with what is to be known of this rank."""
        raise NotImplementedError

    def tell(self, verdict: Verdict) -> None:
        """Lets the other ranks know, as far as they can be reached."""
        raise NotImplementedError

    def _goodbye(self) -> None:
        raise NotImplementedError

    def _forget(self) -> None:
        """In a forked child: it must not keep the connections of its parent open."""
        raise NotImplementedError

    def state(self) -> Seen:
        normal = time.monotonic() - self.normal_since
        return replace(self.me, waits=self.waits(), counts=dict(self.counts), where=where(), normal=normal)


class Centre(Watchdog):
    """Rank 0's."""

    def _connect(self, host: str, exchange: Exchange) -> None:
        self.listener = socket.create_server((host, 0), backlog=max(128, self.ranks))
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.seen: dict[int, Seen] = {}
        self.heard: dict[int, float] = {}
        self.lines: dict[socket.socket, _Lines] = {}
        self.rank_of: dict[socket.socket, int] = {}
        exchange(f"{host}:{self.listener.getsockname()[1]}")

    def run(self) -> None:
        due = time.monotonic()
        while True:
            for key, _ in self.selector.select(max(0.0, due - time.monotonic())):
                if key.fileobj is self.listener:
                    self._accept()
                else:
                    self._read(key.fileobj)
            if time.monotonic() < due:
                continue
            due = time.monotonic() + self.interval
            self.show()
            self._judge()

    def _accept(self) -> None:
        one, _ = self.listener.accept()
        one.setblocking(False)
        self.lines[one] = _Lines()
        self.selector.register(one, selectors.EVENT_READ)

    def _read(self, one: socket.socket) -> None:
        messages, open_still = self.lines[one].read(one)
        for message in messages:
            if "state" in message:
                state = _seen(message["state"])
                self.rank_of[one], self.seen[state.rank], self.heard[state.rank] = state.rank, state, time.monotonic()
            if "verdict" in message and one in self.rank_of:
                self.conclude(Verdict(*message["verdict"]), self.seen[self.rank_of[one]])
        if open_still:
            return
        self.selector.unregister(one)
        one.close()
        rank = self.rank_of.pop(one, None)
        if rank is not None and not self.seen[rank].ended:
            self.conclude(_died(rank), self.seen[rank])

    def _judge(self) -> None:
        now = time.monotonic()
        for rank, state in self.seen.items():
            silent = now - self.heard[rank]
            state.silent = silent if silent > SILENCE * self.interval and not state.ended else 0.0
        verdict = judge({0: self.state(), **self.seen}, self.seconds)
        if verdict is not None:
            self.conclude(verdict, self.seen.get(verdict.rank, self.me))

    def show(self) -> None:
        self._say({"state": _flat(self.me)})

    def _say(self, message: dict) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self.sending:
            for one in list(self.rank_of):
                with contextlib.suppress(OSError):  # its connection's end is noticed where it is read
                    one.send(data)

    def tell(self, verdict: Verdict) -> None:
        culprit = self.seen.get(verdict.rank, self.me)
        self._say({"verdict": verdict, "culprit": _flat(culprit)})
        end = time.monotonic() + 1.0  # the others close when they have read it
        while self.rank_of and time.monotonic() < end:
            for one in list(self.rank_of) if threading.current_thread() is self else ():
                if not self.lines[one].read(one)[1]:
                    self.rank_of.pop(one)
            time.sleep(0.01)

    def _goodbye(self) -> None:
        if not self.leaving:
            self.leaving = self.me.ended = True
            self.show()

    def _forget(self) -> None:
        for one in (self.listener, *self.lines):
            one.close()


class Member(Watchdog):
    """Every other rank's."""

    def _connect(self, host: str, exchange: Exchange) -> None:
        address, port = exchange(None).rsplit(":", 1)
        self.socket = socket.create_connection((address, int(port)), timeout=60)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.socket, selectors.EVENT_READ)
        self.lines = _Lines()
        self.centre = Seen(0, address)

    def run(self) -> None:
        heard = due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + self.interval
                self.show()
            if self.selector.select(max(0.0, due - time.monotonic())):
                messages, open_still = self.lines.read(self.socket)
                heard = time.monotonic()
                for message in messages:
                    self._take(message)
                if not open_still:
                    break
            silent = time.monotonic() - heard
            if silent > self.seconds * (ALLOWANCE if self.centre.slow or self.me.slow else 1) + self.interval:
                why = f"has given no sign of life for {silent:.0f} s (stopped, or its host is down)"
                self.conclude(Verdict(0, why), self.centre)
        if not self.centre.ended:
            self.conclude(_died(0), self.centre)

    def _take(self, message: dict) -> None:
        if "state" in message:
            self.centre = _seen(message["state"])
        if "verdict" in message:
            self.conclude(Verdict(*message["verdict"]), _seen(message["culprit"]))

    def show(self) -> None:
        self._send({"state": _flat(self.state())})

    def _send(self, message: dict) -> None:
        with self.sending, contextlib.suppress(OSError):  # read notices the end of the connection
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def tell(self, verdict: Verdict) -> None:
        if verdict.rank == self.rank:  # else it was rank 0 that told, or that is gone
            self.show()
            self._send({"verdict": verdict})

    def _goodbye(self) -> None:
        if not self.leaving:
            self.leaving = self.me.ended = True
            self.show()

    def _forget(self) -> None:
        self.socket.close()


class _Lines:
    """JSON messages, one a line, out of what a socket has."""

    def __init__(self) -> None:
        self.rest = b""

    def read(self, one: socket.socket) -> tuple[list[dict], bool]:
        """(the messages that have arrived whole, whether more may come)."""
        try:
            data = one.recv(1 << 20)
        except (BlockingIOError, TimeoutError):
            return [], True
        except OSError:
            return [], False
        *whole, self.rest = (self.rest + data).split(b"\n")
        return list(self._decoded(whole)), bool(data)

    def _decoded(self, whole: list[bytes]) -> Iterator[dict]:
        for line in whole:
            with contextlib.suppress(ValueError):  # whoever else connects to an open port
                yield json.loads(line)


def _died(rank: int) -> Verdict:
    return Verdict(rank, "is gone without a word (killed, or out of memory?)")


def _flat(seen: Seen) -> dict:
    return vars(seen)


def _seen(values: dict) -> Seen:
    return Seen(**{**values, "waits": [Wait(*wait) for wait in values["waits"]]})


def where() -> str:
    """The main thread, as file:line in function: the innermost frame that is not of Python, a library or ``calls``."""
    frame = innermost = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None and frame.f_code.co_filename.startswith((*_LIBRARIES, _CALLS, "<")):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "its end"
    path = Path(frame.f_code.co_filename)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(*path.parts[-3:])
    return f"{shown}:{frame.f_lineno} in {frame.f_code.co_name}"


running: Watchdog | None = None  # this process's


def last_words(words: str, code: int) -> None:
    """Tells the other ranks, if there are any, why this one ends; it has told the user."""
    if running is not None:
        running.last_words(words, code)
