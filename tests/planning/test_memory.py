"""Predicted bytes against what Paddle's allocator counts, and against sums done by hand."""

from __future__ import annotations

import dataclasses
import gc
import json
import math

import pytest

from ernie5.config import Config, ParallelConfig, TrainerConfig, model_preset, num_params, parameter_shapes
from ernie5.planning import Layout
from ernie5.planning.machine import PRECISIONS
from ernie5.planning.memory import StageMemory
from ernie5.planning.shards import held_by_stage, owned_by_stage, stage_shapes


def config_of(preset="nano", rows=8, accumulation=1, parallel=None, **model) -> Config:
    trainer = TrainerConfig(rows_per_step=rows, gradient_accumulation=accumulation)
    return Config(
        dataclasses.replace(model_preset(preset), **model), trainer=trainer, parallel=parallel or ParallelConfig()
    )


def memory(config: Config, world: int = 0, stage: int = 0, skew: float = 1.0) -> StageMemory:
    return StageMemory(config, Layout.of(config.parallel, world), PRECISIONS["float32"], stage, skew)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mtp_depth": 0, "shared_expert_intermediate_size": 0},
        {"recompute": True},
        {"moe_sub_batch": 256},
        {"recompute": True, "moe_sub_batch": 256, "mtp_depth": 0},
    ],
    ids=str,
)
def test_activations_and_peak_are_those_of_a_step(options):
    """Within 5 % of Paddle's own count: what forward keeps, and the most there is until the backward pass ends."""
    from benchmarks.plan_runs import SingleProcess, micro_batches
    from ernie5.ops import kernels

    if not kernels.available("moe_ffn"):
        pytest.skip("the plan is that of the compiled kernels")
    import paddle
    from paddle.base import core

    config = config_of(**options)
    gc.collect()
    gc.disable()  # what other tests left must not go in between
    try:
        before = core.host_memory_stat_current_value("Allocated", 0)
        trained = SingleProcess(config)
        trained.step()
        held = core.host_memory_stat_current_value("Allocated", 0)
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        (batch,) = micro_batches(trained.rows, 1)
        outputs = trained.model(**{name: paddle.to_tensor(values) for name, values in batch.items()})
        kept = core.host_memory_stat_current_value("Allocated", 0) - held
        outputs["loss"].backward()
        most = core.host_memory_stat_peak_value("Allocated", 0) - held
    finally:
        gc.enable()
    planned = memory(config)
    peak = planned.peak()
    assert planned.activations == pytest.approx(kept, rel=0.05)
    assert peak.gradients + peak.activations + peak.working == pytest.approx(most, rel=0.05)
    assert peak.parameters + peak.optimizer == pytest.approx(held - before, rel=0.05)  # some tables had no gradient yet


LAYOUTS = {
    "tensor": ({"tensor": 2}, 2),
    "pipeline": ({"pipeline": 2}, 2),
    "chunks": ({"pipeline": 2, "virtual_stages": 3}, 2),
    "experts": ({"expert": 4}, 4),
    "all": ({"tensor": 2, "pipeline": 3, "expert": 4, "sharding": 2}, 12),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_put_together_are_the_model(name):
    """Every parameter is on some stage; its part times the parts is the whole; shapes and counts agree."""
    degrees, world = LAYOUTS[name]
    model, layout = model_preset("nano"), Layout.of(ParallelConfig(**degrees), world)
    whole, seen = parameter_shapes(model), {}
    for stage in range(layout.pipeline):
        shapes, held = stage_shapes(model, layout, stage), held_by_stage(model, layout, stage)
        assert sum(map(math.prod, shapes.values())) == held.total
        assert sum(math.prod(shape) for n, shape in shapes.items() if ".experts." in n) == held.experts
        seen |= shapes
    assert seen.keys() == whole.keys()
    parts = {name: math.prod(whole[name]) // math.prod(shape) for name, shape in seen.items()}
    for parameter, count in parts.items():
        divided = "_proj" in parameter or "shared" in parameter or parameter == "embedding.tokens.weight"
        wanted = layout.expert if ".experts." in parameter else layout.tensor if divided else 1
        assert count == wanted, parameter
    assert sum(math.prod(shape) * parts[n] for n, shape in seen.items()) == num_params(model).total


@pytest.mark.parametrize(
    ("degrees", "world", "replicas"),
    [
        ({"sharding": 4}, 4, 4),
        ({"sharding": 4, "expert": 2}, 4, 2),
        ({"sharding": 2, "expert": 2}, 8, 4),  # further replicas along the data axis
        ({"sharding": 4, "expert": 4}, 4, 1),
    ],
)
def test_zero_gives_each_rank_about_its_share(degrees, world, replicas):
    """Of routed experts, of all that ranks hold the same; where each is held once nothing is divided."""
    model, layout = model_preset("nano"), Layout.of(ParallelConfig(**degrees), world)
    held, owned = held_by_stage(model, layout, 0), owned_by_stage(model, layout, 0)
    share = held.dense / layout.sharding + held.experts / replicas
    assert share <= owned.total < share * 1.1
    if replicas == 1:
        assert owned.experts == held.experts


@pytest.mark.parametrize("degrees", [{}, {"pipeline": 2}], ids=str)
def test_stage_two_needs_less_than_stage_one_in_a_pipeline_too(degrees):
    """By the gradients that the rank does not own, but for those of the heads and of one block."""
    first, second = (
        memory(
            config_of(rows=1, accumulation=4, parallel=ParallelConfig(sharding=4, sharding_stage=stage, **degrees)),
            stage=degrees.get("pipeline", 1) - 1,
        )
        for stage in (1, 2)
    )
    saved = first.peak().total - second.peak().total
    others = (first.held.total - first.owned.total) * 4
    outside = (first.held.total - first.blocks * first.block.total) * 4
    assert others - outside - 2 * first.block.total * 4 <= saved <= others


def test_skew_reaches_every_token_of_the_group_and_no_more():
    config = config_of(parallel=ParallelConfig(expert=4))
    even, twice, worst = (memory(config, 4, skew=skew) for skew in (1.0, 2.0, float("inf")))
    tokens = 8 * 256
    assert worst.received == 4 * tokens and twice.received == pytest.approx(2 * even.received, abs=1)
    assert even.peak().total < twice.peak().total < worst.peak().total
    alone = memory(config_of(), skew=float("inf"))
    assert alone.received == tokens and alone.peak() == memory(config_of()).peak()


def test_pipeline_holds_a_micro_batch_for_each_stage_behind():
    config = config_of(rows=1, accumulation=8, parallel=ParallelConfig(pipeline=3), mtp_depth=0)
    stages = [memory(config, stage=stage) for stage in range(3)]
    per = stages[0].kept_of_block * 2 + stages[0].tables + stages[0].states  # and what it handed on
    fed_back = 2 * 2 * stages[0].states  # before codes are added: behind blocks 2 and 3, of two micro-batches
    assert stages[0].activations - stages[1].activations == pytest.approx(per - fed_back)
    assert stages[2].kept_of_heads > 0 == stages[0].kept_of_heads


@pytest.mark.parametrize(
    ("degrees", "world", "wanted"),
    [
        ({}, 1, lambda held: 0),
        ({}, 2, lambda held: held.total),
        ({"expert": 2}, 2, lambda held: held.dense),  # experts have no replica
        ({"expert": 2}, 4, lambda held: max(held.dense, held.experts)),  # one group after the other
        ({"sharding": 2}, 2, lambda held: 0),  # reduced in place, each parameter onto its owner
    ],
    ids=["alone", "dp2", "ep2", "dp2.ep2", "zero2"],
)
def test_gradients_are_joined_for_one_group_at_a_time(degrees, world, wanted):
    planned = memory(config_of(parallel=ParallelConfig(**degrees)), world)
    assert planned.summed_copy == 4 * wanted(planned.held)


def test_the_last_look_up_makes_the_tables_gradient_once_more():
    """Few tokens, many words: the fullest moment is the end of the backward pass, with two gradients of the table."""
    config = config_of(rows=1, max_sequence_length=64, vocab_size=65536)
    peak, table = memory(config).peak(), 4 * 65536 * config.model.hidden_size
    assert peak.gradients == 4 * num_params(config.model).total
    assert table <= peak.working < 1.1 * table


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"tensor": 2}, {"pipeline": 2}, {"sharding": 2}], ids=str)
def test_every_process_of_a_layout_holds_what_is_planned(degrees):
    """Within 5 % of Paddle's own count on each rank, and the parameters to the last one."""
    from benchmarks.plan_accuracy import measured
    from benchmarks.plan_runs import Run
    from ernie5.ops import kernels

    if not kernels.available("moe_ffn"):
        pytest.skip("the plan is that of the compiled kernels")
    accumulation = 2 if "pipeline" in degrees else 1
    run = Run("test", "nano", 4, accumulation, {"num_layers": 4}, degrees, processes=2)
    stages = run.plan().stages
    for found in measured(json.dumps(dataclasses.asdict(run)), run.processes, threads=2):
        planned = stages[found["stage"]]
        assert found["parameters"] == planned.held.total
        assert planned.memory.total == pytest.approx(found["allocated"], rel=0.05)


@pytest.mark.parametrize("change", [{"tensor": 2}, {"context": 2}, {"expert": 2}, {"sharding": 2}])
def test_dividing_saves_memory(change):
    alone, divided = config_of(), config_of(parallel=ParallelConfig(**change))
    assert memory(divided, 2).peak().total < memory(alone, 1).peak().total
