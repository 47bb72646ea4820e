"""ZeRO's table: nothing is kept twice among those who divide it, and nobody keeps much more than his share."""

from __future__ import annotations

import numpy as np
import pytest

from ernie5.config.schema import ParallelConfig
from ernie5.parallel.layout import Layout
from ernie5.parallel.ownership import Ownership, share_out

SIZES = {
    "table": 500,
    **{f"{i}.{name}": size for i in range(4) for name, size in (("up", 400), ("down", 200), ("q", 90))},
}
SPREAD = {name for name in SIZES if name.endswith(("up", "down"))}
LAYOUTS = [
    (4, {"sharding": 4}),
    (4, {"sharding": 2}),
    (4, {"sharding": 4, "expert": 2}),
    (8, {"sharding": 2, "tensor": 2, "expert": 2}),
    (8, {"sharding": 2, "context": 2, "tensor": 2, "expert": 4}),
    (6, {"sharding": 3, "expert": 2}),
    (4, {"sharding": 4, "expert": 4}),
]


def shared(ranks: int, degrees: dict) -> tuple[Layout, Ownership]:
    layout = Layout(ParallelConfig(**degrees), ranks)
    c = layout.config
    return layout, share_out(SIZES, SPREAD, {"table": 0}, ranks, c.sharding, c.context * c.tensor, c.expert)


@pytest.mark.parametrize(("ranks", "degrees"), LAYOUTS)
def test_every_state_is_kept_once_by_those_who_divide_it(ranks, degrees):
    layout, found = shared(ranks, degrees)
    dense, experts = np.zeros(ranks, int), np.zeros(ranks, int)
    for name, owner in found.owner.items():
        groups = layout.expert_replicas() if name in SPREAD else layout.along("sharding")
        for group in groups:
            part = layout.flat(group[0]) % layout.config.expert if name in SPREAD else 0
            (experts if name in SPREAD else dense)[group[owner[part]]] += SIZES[name]
    assert found.owner.keys() == SIZES.keys() and found.owner["table"] == [0]
    np.testing.assert_array_equal(found.dense, dense)
    np.testing.assert_array_equal(found.experts, experts)


@pytest.mark.parametrize(("ranks", "degrees"), LAYOUTS)
def test_no_rank_keeps_more_than_its_share_and_one_parameter(ranks, degrees):
    layout, found = shared(ranks, degrees)
    routed = sum(SIZES[name] for name in SPREAD)
    share = (sum(SIZES.values()) - routed) / layout.config.sharding + routed / (ranks / layout.config.expert)
    assert (found.dense + found.experts).max() <= share + max(SIZES.values())
