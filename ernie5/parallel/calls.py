"""Which collective every thread of this process is in: noted around each call, without talking to anybody.

Whatever reaches another rank through Paddle, Fleet's own calls included, goes through a method of ``ProcessGroup``;
``install`` wraps these. What goes past it, the threads of ``custom_ops/exchange``, is noted where it is waited for
(``begin``, ``inside``). On the CPU a call lasts as long as its communication. NCCL's return at once, so there the last
one counts as lasting until the next; that half has not run yet.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from paddle.base import core
from paddle.distributed import collective

COLLECTIVES = (
    *("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "all_gather_partial", "gather"),
    *("scatter", "scatter_tensor", "reduce_scatter", "reduce_scatter_tensor", "barrier"),
    *("all_to_all", "all_to_all_tensor", "all_to_all_single", "allreduce", "alltoall", "alltoall_single"),
)
TO_A_PEER, FROM_A_PEER = ("send", "send_partial"), ("recv", "recv_partial")
ON_STREAM = "_on_calc_stream"


class Call(NamedTuple):
    """One collective or message. ``number`` counts those with the same ``key``, alike on every rank that takes part."""

    name: str
    key: str
    ranks: tuple[int, ...]  # of the run, that take part
    number: int
    since: float  # time.monotonic()


class Calls:
    """``open``: the call each thread is in; ``counts``: how many with each key have begun."""

    def __init__(self) -> None:
        self.open: dict[int, Call] = {}
        self.counts: dict[str, int] = {}
        self.on_failure: Callable[[Call, Exception], None] | None = None
        self.returns_at_once = False
        self._ranks: dict[object, tuple[str, tuple[int, ...]]] = {}

    def begin(self, name: str, group: object, peers: tuple[int, int] | None = None) -> Call:
        """Counts a call of ``group``, a ``Group`` or its process group; ``peers``: sender, receiver in the group."""
        key, ranks = self._ranks.get(group) or self._look_up(group)
        if peers is not None:
            key, ranks = f"{key}:{peers[0]}>{peers[1]}", tuple(ranks[peer] for peer in peers)
        number = self.counts[key] = self.counts.get(key, 0) + 1
        return Call(name, key, ranks, number, time.monotonic())

    @contextlib.contextmanager
    def inside(self, call: Call) -> Iterator[None]:
        """This thread is in ``call`` until the block ends; an error that a lost peer explains ends the process."""
        thread = threading.get_ident()
        self.open[thread] = call
        try:
            yield
        except (OSError, RuntimeError) as error:
            if self.on_failure is not None:
                self.on_failure(call, error)
            raise
        finally:
            if not self.returns_at_once:
                self.open.pop(thread, None)

    def waiting(self) -> list[Call]:
        """The open calls, the longest first."""
        return sorted(self.open.copy().values(), key=lambda call: call.since)

    def _look_up(self, group: object) -> tuple[str, tuple[int, ...]]:
        for known in list(collective._get_group_map_by_name().values()):
            if group is known or (known.process_group is group and group is not None):
                self._ranks[group] = str(known.id), tuple(known.ranks)
                return self._ranks[group]
        return "unknown", ()


calls = Calls()  # of this process


@functools.cache
def install() -> None:
    """Wraps the methods of Paddle's process groups; those of groups that exist already too."""
    for name in (*COLLECTIVES, *TO_A_PEER, *FROM_A_PEER):
        for method in (name, name + ON_STREAM):
            if hasattr(core.ProcessGroup, method):
                setattr(core.ProcessGroup, method, _noted(getattr(core.ProcessGroup, method), name))


def _noted(method: Callable, name: str) -> Callable:
    @functools.wraps(method, assigned=("__name__", "__doc__"))
    def noted(group: core.ProcessGroup, *arguments: object, **options: object) -> object:
        peers = None
        if name in TO_A_PEER:
            peers = group.rank(), arguments[1]
        elif name in FROM_A_PEER:
            peers = arguments[1], group.rank()
        with calls.inside(calls.begin(name, group, peers)):
            return method(group, *arguments, **options)

    return noted
