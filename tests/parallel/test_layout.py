"""Ranks and groups as arithmetic: who shares what, and which degrees are refused."""

from __future__ import annotations

import pytest

from ernie5.config.schema import ParallelConfig
from ernie5.parallel.layout import Layout


def layout(ranks: int, **degrees: int) -> Layout:
    return Layout(ParallelConfig(**degrees), ranks)


@pytest.mark.parametrize(
    ("ranks", "degrees", "message"),
    [
        (
            6,
            {"tensor": 2, "pipeline": 2},
            "tensor 2 x pipeline 2 x context 1 x sharding 1 = 4 does not divide the 6 proc",
        ),
        (1, {"context": 2}, "= 2 does not divide the 1 processes"),
        (8, {"pipeline": 2, "expert": 3}, "expert = 3 does not divide data 4 x sharding 1 x context 1 x tensor 1 = 4"),
    ],
)
def test_degrees_that_do_not_fit_the_processes_are_named(ranks, degrees, message):
    with pytest.raises(ValueError, match=message):
        layout(ranks, **degrees)


def test_data_is_what_is_left_and_rows_go_to_data_and_sharding_ranks():
    made = layout(16, tensor=2, pipeline=2, sharding=2)
    assert (made.data, made.rows, made.stage_ranks) == (2, 4, 8)
    assert sorted(made.row_of(rank) for rank in range(16)) == [row for row in range(4) for _ in range(4)]
    for ranks in made.along("tensor", "pipeline", "context"):
        assert len({made.row_of(rank) for rank in ranks}) == 1, "ranks that share a row read the same one"


@pytest.mark.parametrize("axes", [("tensor",), ("pipeline",), ("data", "sharding", "context"), ("data", "context")])
def test_groups_cover_every_rank_once(axes):
    groups = layout(16, tensor=2, pipeline=2, sharding=2).along(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(16))


def test_expert_groups_are_consecutive_in_a_stage_and_span_tensor_and_data():
    made = layout(16, tensor=2, pipeline=2, expert=4)
    for group in made.experts():
        assert len({made.coordinates[rank].pipeline for rank in group}) == 1
        assert [made.flat(rank) % 4 for rank in group] == [0, 1, 2, 3]
        assert len({made.coordinates[rank].tensor for rank in group}) == 2
        assert len({made.coordinates[rank].data for rank in group}) == 2
    for group in made.expert_replicas():
        assert len({made.flat(rank) % 4 for rank in group}) == 1
        assert len(group) == 2


def test_virtual_stages_take_turns():
    made = layout(2, pipeline=2, virtual_stages=2)
    assert made.blocks(0, 8) == [[0, 1], [4, 5]]
    assert made.blocks(1, 8) == [[2, 3], [6, 7]]
    for stage in range(2):
        assert {made.stage_of(block, 8) for piece in made.blocks(stage, 8) for block in piece} == {stage}
