"""Degrees against processes, blocks over stages, and the pipeline's schedule against one played move by move."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ernie5.config import ParallelConfig, load_config, model_preset
from ernie5.planning import Layout, load_machine, make_plan, smallest_world
from ernie5.planning.layout import ranks_of_a_token
from ernie5.planning.timing import turn_seconds

ROOT = Path(__file__).resolve().parents[2]


def layout(world: int = 0, **degrees) -> Layout:
    return Layout.of(ParallelConfig(**degrees), world)


@pytest.mark.parametrize(
    ("degrees", "world", "wanted"),
    [
        ({"tensor": 2, "pipeline": 3}, 8, "tensor 2 x pipeline 3 x context 1 x sharding 1 = 6 does not divide 8"),
        ({"expert": 8, "pipeline": 2}, 8, "parallel.expert = 8 does not divide the 4 ranks of a pipeline stage"),
    ],
)
def test_degrees_that_do_not_divide_are_named(degrees, world, wanted):
    with pytest.raises(ValueError, match=wanted):
        layout(world, **degrees)


@pytest.mark.parametrize(
    ("degrees", "wanted"),
    [
        ({}, 1),
        ({"expert": 4}, 4),
        ({"tensor": 4, "pipeline": 12, "expert": 64, "sharding": 16}, 768),
        ({"tensor": 4, "expert": 6}, 12),
    ],
)
def test_smallest_world_is_the_first_that_is_accepted(degrees, wanted):
    assert smallest_world(ParallelConfig(**degrees)) == wanted == layout(**degrees).world
    for fewer in range(1, wanted):
        with pytest.raises(ValueError, match="does not divide"):
            layout(fewer, **degrees)


def test_chunks_cover_the_network_in_turns():
    both = layout(pipeline=2, virtual_stages=3)
    assert [list(chunk) for chunk in both.stage_chunks(0, 12)] == [[0, 1], [4, 5], [8, 9]]
    assert [list(chunk) for chunk in both.stage_chunks(1, 12)] == [[2, 3], [6, 7], [10, 11]]


def moves(stages: int, chunks: int, stage: int, count: int) -> list[tuple[str, int]]:
    """What a stage does in order, ("F" or "B", number of the chunk's pass): the schedules of arXiv 2104.04473 §2.2."""
    total = count * chunks
    if chunks == 1:
        ahead = min(stages - stage - 1, count)
    else:
        ahead = min((stages - stage - 1) * 2 + (chunks - 1) * stages, total)
    order = [("F", i) for i in range(ahead)]
    for i in range(total - ahead):
        order += [("F", ahead + i), ("B", i)]
    return order + [("B", i) for i in range(total - ahead, total)]


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(("stages", "count"), [(2, 4), (4, 8), (4, 4), (3, 12)])
def test_in_flight_is_what_the_schedule_holds(stages, chunks, count):
    made = layout(pipeline=stages, virtual_stages=chunks)
    for stage in range(stages):
        held = most = 0
        for what, _ in moves(stages, chunks, stage, count):
            held += 1 if what == "F" else -1
            most = max(most, held)
        assert held == 0 and made.in_flight(stage, count) == most


def played(count: int, forward: list[float], backward: list[float]) -> float:
    """When the last stage is through, if a pass takes each stage so long once what it waits for is done."""
    stages = len(forward)
    done: dict[tuple[int, str, int], float] = {}
    clock, queue = [0.0] * stages, [moves(stages, 1, stage, count) for stage in range(stages)]
    while any(queue):
        for stage in range(stages):
            if not queue[stage]:
                continue
            what, i = queue[stage][0]
            before = (stage - 1, "F", i) if what == "F" else (stage + 1, "B", i)
            outside = before[0] in (-1, stages)
            if not outside and before not in done:
                continue
            clock[stage] = max(clock[stage], done.get(before, 0)) + (forward if what == "F" else backward)[stage]
            done[stage, what, i] = clock[stage]
            queue[stage].pop(0)
    return max(clock)


@pytest.mark.parametrize(("stages", "count"), [(2, 4), (4, 8), (4, 3), (3, 12)])
def test_bubble_is_the_idle_share_of_a_schedule_played_out(stages, count):
    idle = 1 - 2 * count / played(count, [1] * stages, [1] * stages)
    assert layout(pipeline=stages).bubble(count) == pytest.approx(idle)


@pytest.mark.parametrize(("stages", "count"), [(2, 4), (4, 8), (4, 3)])
def test_a_step_of_uneven_stages_takes_as_long_as_their_schedule_played_out(stages, count):
    """The heads make the last stage the slowest."""
    config = load_config(ROOT / "fleet_configs" / "gpu_8.yaml", [f"parallel.pipeline={stages}"])
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, gradient_accumulation=count))
    plan = make_plan("", config, load_machine("h100"), 8 * stages)
    turns = [turn_seconds(config, plan.layout, plan.machine, stage) for stage in range(stages)]
    assert plan.slowest == stages - 1 and turns[-1] > 1.1 * turns[0]
    once = plan.time.optimizer + sum(t.exposed for t in plan.traffic if not t.each_micro_batch)
    wanted = played(count, [turn / 3 for turn in turns], [turn * 2 / 3 for turn in turns])
    assert plan.time.total - once == pytest.approx(wanted)


@pytest.mark.parametrize(("experts", "expert", "top_k"), [(4, 2, 2), (6, 3, 2), (8, 4, 3)])
def test_ranks_of_a_token_by_counting_all_choices(experts, expert, top_k):
    from itertools import combinations

    model = dataclasses.replace(model_preset("tiny"), num_experts=experts, experts_per_token=top_k)
    size = experts // expert
    hits = [len({choice // size for choice in chosen}) for chosen in combinations(range(experts), top_k)]
    assert ranks_of_a_token(model, layout(expert=expert)) == pytest.approx(sum(hits) / len(hits))
