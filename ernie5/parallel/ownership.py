"""ZeRO's table: which rank of a stage keeps the optimizer state of which parameter, the same on every rank of it.

Routed experts are divided among all ranks that hold the same ones: an expert group cuts across the axes, and so do its
replicas, Fleet's MoE sharding group. Every other parameter is divided along the sharding axis alone, and its owners at
the other places of the stage (data, context, tensor) each keep a copy of the state.

F ranks of a stage, numbered as in ``layout.py``; whoever holds the experts of f holds f % expert of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ownership:
    """``owner[name]``: of an expert [expert], which of its replicas for each part of the experts; of others [1], which
    place of the sharding axis. ``dense`` and ``experts`` [F]: numbers of parameters whose state a rank keeps.
    """

    owner: dict[str, np.ndarray]
    dense: np.ndarray
    experts: np.ndarray


def share_out(
    sizes: Mapping[str, int],
    spread: Set[str],
    fixed: Mapping[str, int],
    ranks: int,
    sharding: int,
    inner: int,
    expert: int,
) -> Ownership:
    """Whole parameters go to the rank that keeps least so far, the largest first.

    ``sizes``: numbers on one rank; ``spread``: those of them that are routed experts; ``fixed``: owners along the
    sharding axis that are given, of tables that other stages hold too. ``ranks`` F, of which ``inner`` neighbours
    (context x tensor) share a place of the sharding axis.
    """
    dense, experts = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    places = (-1, sharding, inner)
    owner = {}
    for name in sorted(sizes, key=lambda name: (name not in fixed, -sizes[name])):
        load = dense + experts
        if name in spread:
            owner[name] = load.reshape([-1, expert]).argmin(0)
            experts.reshape([-1, expert])[owner[name], np.arange(expert)] += sizes[name]
            continue
        least = load.reshape(places).max((0, 2)).argmin()
        owner[name] = np.array([fixed.get(name, least)])
        dense.reshape(places)[:, owner[name]] += sizes[name]
    return Ownership(owner, dense, experts)
