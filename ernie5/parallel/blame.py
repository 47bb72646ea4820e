"""Who keeps the others waiting: from what every rank last said of itself, as plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ALLOWANCE = 6  # times the time-out, while a rank starts, compiles, takes its first step or saves
LISTED = 8  # ranks of a group that are listed one by one


class Wait(NamedTuple):
    """A collective or message that a rank is in; see ``ernie5.parallel.calls.Call``."""

    name: str
    key: str
    ranks: Sequence[int]
    number: int
    seconds: float  # since it began
    ends: bool = True  # whether it is left when it has ended; NCCL's calls return at once, and are taken to last on

    def __str__(self) -> str:
        ranks = list(map(str, self.ranks))
        if self.name.startswith("send"):
            return f"{self.name} to rank {ranks[-1]}"
        if self.name.startswith("recv"):
            return f"{self.name} from rank {ranks[0]}"
        if len(ranks) > LISTED:
            return f"{self.name} over {len(ranks)} ranks, {ranks[0]} .. {ranks[-1]}"
        return f"{self.name} over ranks {', '.join(ranks)}" if ranks else self.name


@dataclass
class Seen:
    """What a rank last said of itself. ``counts``: how many calls of each key it has begun."""

    rank: int
    host: str = "?"
    pid: int = 0
    waits: list[Wait] = field(default_factory=list)  # the longest first
    counts: dict[str, int] = field(default_factory=dict)
    where: str = "?"  # its main thread, as file:line in function
    step: int = 0
    slow: str = ""  # what it does that may take long
    normal: float = 1.0e9  # seconds since it last did such a thing; it cannot have been late for longer
    silent: float = 0.0  # seconds without a sign of life; 0: it lives
    ended: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


class Verdict(NamedTuple):
    """Why the run ends: what ``rank`` did, in words that follow its name, and who waits for it."""

    rank: int
    why: str
    waiting: str = ""
    code: int = 0  # the exit code of every rank; 0: the usual one


def judge(seen: Mapping[int, Seen], seconds: float) -> Verdict | None:
    """The rank for which another has waited longer than ``seconds``, or ``ALLOWANCE`` times as long if either is slow.

    Who waits in its turn hands the blame on. A rank that has ended is blamed at once if someone still waits for it.
    """
    for waiter, wait in sorted(_all_waits(seen), key=lambda pair: -pair[1].seconds):
        missing = _missing(waiter, wait, seen)
        gone = [other for other in missing if other.ended]
        culprit = gone[0] if gone else _root(waiter, missing, seen)
        late = wait.seconds if missing else _together(wait, seen)
        if any(one.slow for one in (waiter, culprit, *missing)):
            late /= ALLOWANCE
        else:
            late = min(late, culprit.normal + culprit.silent)
        if not gone and late <= seconds:
            continue
        waiting = f"rank {waiter.rank} on {waiter.host} has waited {wait.seconds:.0f} s for it in {wait}"
        return Verdict(culprit.rank, _why(culprit, waiter, wait, seen), "" if culprit is waiter else waiting)
    return None


def _all_waits(seen: Mapping[int, Seen]) -> Iterator[tuple[Seen, Wait]]:
    for one in seen.values():
        if not one.silent and not one.ended:
            yield from ((one, wait) for wait in one.waits)


def _missing(waiter: Seen, wait: Wait, seen: Mapping[int, Seen]) -> list[Seen]:
    """Who has not come to ``wait``; if all have, who among them gives no sign of life."""
    others = [seen[rank] for rank in wait.ranks if rank != waiter.rank and rank in seen]
    late = [other for other in others if other.counts.get(wait.key, 0) < wait.number]
    return late or [other for other in others if other.silent]


def _together(wait: Wait, seen: Mapping[int, Seen]) -> float:
    """For how long all its ranks have been in ``wait``; 0 if one is not, which may be computing long since."""
    same = [
        next((w.seconds for w in seen[rank].waits if (w.key, w.number, w.ends) == (wait.key, wait.number, True)), 0.0)
        for rank in wait.ranks
        if rank in seen
    ]
    return min(same, default=0.0)


def _root(waiter: Seen, missing: list[Seen], seen: Mapping[int, Seen]) -> Seen:
    """Follows who waits for whom to one that waits for nobody, or to where it turns in a circle."""
    passed = [waiter]
    while missing:
        free = [one for one in missing if one.silent or one.ended or not _held(one, seen)]
        if free:
            return sorted(free, key=lambda one: (not one.silent, not one.ended, one.rank))[0]
        ahead = missing[0]
        if ahead in passed:
            return ahead if ahead is not waiter else passed[-1]
        passed.append(ahead)
        missing = _held(ahead, seen)
    return passed[-1]


def _held(one: Seen, seen: Mapping[int, Seen]) -> list[Seen]:
    """For whom ``one`` waits."""
    return next((missing for wait in one.waits if (missing := _missing(one, wait, seen))), [])


def _why(culprit: Seen, waiter: Seen, wait: Wait, seen: Mapping[int, Seen]) -> str:
    if culprit is waiter:
        return f"is in {wait} since {wait.seconds:.0f} s, and nothing moves though every rank came: is the network up?"
    if culprit.silent:
        return f"has given no sign of life for {culprit.silent:.0f} s (stopped, or its host is down)"
    if culprit.ended:
        return "has ended while others still need it"
    if _held(culprit, seen):
        return f"is in {culprit.waits[0]} instead: ranks wait for each other in different calls, at {culprit.where}"
    doing = f", {culprit.slow}" if culprit.slow else ""
    return f"did not come: it is at {culprit.where}{doing}"
