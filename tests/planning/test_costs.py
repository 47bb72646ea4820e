"""Messages and seconds by hand, machines, and the search."""

from __future__ import annotations

import dataclasses
import re

import pytest

from ernie5.config import (
    Config,
    ParallelConfig,
    TrainerConfig,
    flops_per_token,
    model_preset,
    parameter_shapes,
    score_flops,
)
from ernie5.planning import load_machine, machine_names, make_plan
from ernie5.planning.machine import MACHINES
from ernie5.planning.memory import StageMemory
from ernie5.planning.search import overrides, search

LAPTOP = load_machine("laptop")
D, HEADS, GROUPS, WIDTH = 128, 4, 2, 32  # of nano
TOKENS = 2 * 256


def plan_of(world: int, machine: str = "h100", accumulation: int = 2, **degrees):
    trainer = TrainerConfig(rows_per_step=2, gradient_accumulation=accumulation, bf16=machine != "laptop")
    model = dataclasses.replace(model_preset("nano"), mtp_depth=0)
    config = Config(model=model, trainer=trainer, parallel=ParallelConfig(**degrees))
    return make_plan("test", config, load_machine(machine), world)


def sent(plan, kind: str) -> float:
    return {traffic.kind: traffic.sent for traffic in plan.traffic}.get(kind, 0.0)


def test_one_process_sends_nothing():
    assert plan_of(1).traffic == []


def test_gradients_of_two_replicas():
    """All-reduce over two ranks: each sends as many bytes as there are gradients (2 of each value in bfloat16)."""
    plan = plan_of(2)
    assert sent(plan, "gradients") == plan.stages[0].held.total * 2
    assert sent(plan, "ZeRO gather") == 0
    assert sent(plan_of(2, sharding=2), "ZeRO gather") == plan.stages[0].held.total * 2 / 2


def test_stage_two_reduces_to_owners_in_every_micro_batch():
    """Each of two ranks sends half of its gradients to the other owner, twice; nothing is left to sum."""
    plan = plan_of(2, accumulation=2, sharding=2, sharding_stage=2)
    assert sent(plan, "gradients") == 2 * plan.stages[0].held.total * 2 / 2


def test_sequence_parallelism_gathers_and_scatters_six_times_a_pass():
    """q, k, v, shared expert gathered, two scatters; forward and backward; two at the embedding, two at the head."""
    count = 6 * 2 * 6 + 2 + 2
    assert sent(plan_of(2, tensor=2), "sequence") == 2 * count * TOKENS * D * 2 / 2


def test_pipeline_sends_states_on_and_gradients_back():
    """A middle stage sends both in every micro-batch."""
    assert sent(plan_of(3, accumulation=3, pipeline=3), "pipeline") in (3 * 2 * TOKENS * D * 2, 3 * 1 * TOKENS * D * 2)


def test_context_gathers_keys_and_values():
    whole = 2 * TOKENS * GROUPS * WIDTH * 2
    assert sent(plan_of(2, context=2), "context") == 2 * 6 * 2 * whole / 2


def test_expert_traffic_counts_a_token_once_a_rank():
    """2 of 32 experts over 2 ranks: 1 + P(both on different ranks) ranks a token, half of them elsewhere."""
    ranks = 1 + 16 / 31
    expected = 2 * 6 * 2 * 2 * TOKENS * ranks / 2 * (D * 2 + 4 * 2)
    assert sent(plan_of(2, expert=2), "expert") == pytest.approx(expected)


def test_links_of_groups_wider_than_a_node_are_the_network():
    plan = plan_of(16, tensor=2, accumulation=4)
    links = {traffic.kind: traffic.link for traffic in plan.traffic}
    assert links == {"sequence": "node", "gradients": "network"}


def test_a_machine_without_a_network_refuses_several_nodes(tmp_path):
    text = (MACHINES / "h100.yaml").read_text().replace("inter_bandwidth: 50", "inter_bandwidth: 0")
    (tmp_path / "alone.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"has no network .* 16 processes need several nodes"):
        plan_of(16, str(tmp_path / "alone.yaml"))


def test_products_take_the_operations_of_training():
    machine = dataclasses.replace(load_machine("h100"), memory_bandwidth=1e9)
    config = Config(model=model_preset("nano"), trainer=TrainerConfig(rows_per_step=4, bf16=True))
    plan = make_plan("test", config, machine)
    operations = 3 * 4 * 256 * flops_per_token(config.model, 256)
    assert plan.flops == operations
    assert plan.time.compute == pytest.approx(operations / (989e12 * machine.efficiency))
    again = make_plan(
        "test", dataclasses.replace(config, model=dataclasses.replace(config.model, recompute=True)), machine
    )
    assert plan.flops == again.flops and plan.time.compute < again.time.compute < plan.time.compute * 4 / 3


def test_processes_of_a_laptop_share_it():
    one, two = plan_of(1, "laptop"), plan_of(2, "laptop")
    assert two.limit == one.limit / 2
    assert two.time.compute == pytest.approx(2 * one.time.compute)


def test_operators_pass_activations_through_memory_where_efficiency_does_not_have_it():
    assert plan_of(1, "h100").time.traffic == 0
    plan = plan_of(1, "laptop")
    memory = StageMemory(plan.config, plan.layout, plan.machine.bytes_of, 0)
    passed = 5 * (6 * memory.kept_of_block + memory.kept_of_heads) + (5 + 3) * memory.table
    assert plan.time.traffic == pytest.approx(2 * passed / 17e9)  # two micro-batches
    again = dataclasses.replace(plan.config, model=dataclasses.replace(plan.config.model, recompute=True))
    forward = 2 * 6 * memory.kept_of_block
    assert make_plan("test", again, plan.machine).time.traffic == pytest.approx(2 * (passed + forward) / 17e9)


def test_a_process_with_one_core_passes_memory_slower():
    one, two, four = (plan_of(world, "laptop").time.traffic for world in (1, 2, 4))
    assert two == pytest.approx(one / LAPTOP.lone_core) and four == pytest.approx(2 * two)


def test_values_pass_as_slowly_in_bfloat16():
    config = Config(model=model_preset("nano"), trainer=TrainerConfig(rows_per_step=4))
    wide, narrow = (
        make_plan("test", dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, bf16=bf16)), LAPTOP)
        for bf16 in (False, True)
    )
    assert narrow.time.traffic == wide.time.traffic and narrow.time.overhead == wide.time.overhead
    assert narrow.time.compute < wide.time.compute


def test_products_read_and_write_operands():
    """Every product's rows in and out and its weight, once forward and twice backward, at the memory's rate."""
    config = Config(
        model=dataclasses.replace(model_preset("nano"), mtp_depth=0), trainer=TrainerConfig(rows_per_step=2)
    )
    bare = dataclasses.replace(LAPTOP, operand_passes=0)
    more = make_plan("t", config, LAPTOP).time.compute - make_plan("t", config, bare).time.compute
    widths = [(D, D), (D, 64), (D, 64), (D, D), (D, 32), (D, 128), (64, D)]  # q, k, v, out, router, shared expert
    values = sum(TOKENS * (a + b) + a * b for a, b in widths)
    values += 2 * TOKENS * (D + 128 + 64 + D) + 32 * 3 * D * 64  # two experts a token, all 32 read
    head = TOKENS * (D + 2048) + D * 2048
    assert more == pytest.approx(LAPTOP.operand_passes * 3 * 4 * (6 * values + head) / 34e9)


def test_scores_have_a_rate_of_their_own():
    config = Config(
        model=dataclasses.replace(model_preset("nano"), mtp_depth=0), trainer=TrainerConfig(rows_per_step=2)
    )
    slow = dataclasses.replace(LAPTOP, attention_flops=LAPTOP.attention_flops / 2)
    scores = 3 * 6 * TOKENS * score_flops(config.model, 256)
    more = [make_plan("t", config, m, 2).time.compute for m in (slow, LAPTOP)]
    assert more[0] - more[1] == pytest.approx(scores / 0.07e12)
    config.parallel = ParallelConfig(context=2)  # the later half of every row sees three quarters of all pairs
    more = [make_plan("t", config, m, 2).time.compute for m in (slow, LAPTOP)]
    assert more[0] - more[1] == pytest.approx(0.75 * scores / 0.07e12)


@pytest.mark.parametrize(
    ("degrees", "kind", "woken", "sent_by_themselves"),
    [
        ({"tensor": 2}, "sequence", 6 * 2 * 6 + 2 + 2, 0),
        ({"context": 2}, "context", 6 * 4, 0),
        ({"expert": 2}, "expert", 6 * 8, 0),
        ({"sharding": 2}, "ZeRO gather", 1, "tensors"),
        ({"sharding": 2}, "gradients", 1, "tensors"),
        ({}, "gradients", 1, 1),
    ],
)
def test_messages_wake_the_ranks_that_wait(degrees, kind, woken, sent_by_themselves):
    """Once for each message between computations; at the end of a step ZeRO sends every tensor by itself."""
    trainer = TrainerConfig(rows_per_step=2, gradient_accumulation=1)
    model = dataclasses.replace(model_preset("nano"), mtp_depth=0)
    config = Config(model=model, trainer=trainer, parallel=ParallelConfig(**degrees))

    def seconds(**changed: float) -> float:
        plan = make_plan("test", config, dataclasses.replace(LAPTOP, **changed), 2)
        return next(traffic.seconds for traffic in plan.traffic if traffic.kind == kind)

    tensors = len(parameter_shapes(model)) if sent_by_themselves == "tensors" else sent_by_themselves
    assert seconds() - seconds(wake_up=0.0) == pytest.approx(woken * LAPTOP.wake_up)
    assert seconds() - seconds(latency=0.0) == pytest.approx((tensors or woken) * LAPTOP.latency)


def test_sub_batches_compute_the_experts_once_more():
    config = Config(model=model_preset("nano"), trainer=TrainerConfig(rows_per_step=4))
    parts = dataclasses.replace(config, model=dataclasses.replace(config.model, moe_sub_batch=256))
    whole, cut = (make_plan("test", c, load_machine("laptop")).time for c in (config, parts))
    experts = 4 * 256 * 7 * 2 * 2 * 3 * D * 64  # tokens, blocks with that of MTP, experts a token, products
    rows = 4 * 256 * 2 * (2 * D + 3 * 64)
    weights = 32 * 3 * D * 64  # read once more each for the products of three further sub-batches, and to compute again
    operands = 7 * LAPTOP.operand_passes * 4 * (rows + weights + 3 * 4 * weights) / 34e9
    assert cut.compute - whole.compute == pytest.approx(experts / (2e12 * LAPTOP.float32_flops) + operands)
    assert cut.traffic > whole.traffic


def test_gloo_sums_everywhere_to_scatter():
    """A gather sends what a ring does, a reduce-scatter as much as an all-reduce; float32 in place of bfloat16."""
    ring, gloo = (sent(plan_of(2, machine, tensor=2), "sequence") for machine in ("h100", "laptop"))
    assert gloo == 2 * ring * (1 + 2) / 2


@pytest.mark.parametrize(("stage_ranks", "world", "share"), [(1, 2, 1.0), (1, 4, 0.5), (2, 4, 0.5), (4, 8, 0.5)])
def test_who_waits_leaves_a_shared_core_to_others(stage_ranks, world, share):
    assert load_machine("laptop").idle_share(stage_ranks, world) == share
    assert load_machine("h100").idle_share(stage_ranks, world) == 1.0


@pytest.mark.parametrize("name", machine_names())
def test_every_machine_loads_and_says_where_each_figure_comes_from(name):
    machine = load_machine(name)
    assert machine.bfloat16_flops > machine.float32_flops
    lines = (MACHINES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    names = r"(memory|float32_flops|bfloat16_flops|memory_bandwidth|intra_bandwidth|latency|eff|res|sla)"
    figures = [i for i, line in enumerate(lines) if re.match(names, line)]
    assert len(figures) == 9
    assert [lines[i] for i in figures if "#" not in lines[i] and not lines[i - 1].startswith("#")] == []


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (("float32_flops:", "flops:"), "key 'float32_flops' is missing"),
        (("efficiency: 0.4", "efficiency: 0"), "efficiency is 0.0; it must be above 0"),
        (("bfloat16_flops: 989", "bfloat16_flops: -1"), "bfloat16_flops is -1.0; it must be at least 0"),
    ],
)
def test_a_faulty_machine_is_one_line(tmp_path, change, wanted):
    text = (MACHINES / "h100.yaml").read_text().replace(*change)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=wanted) as caught:
        load_machine(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(caught.value)


def test_unknown_machine_names_the_nearest():
    with pytest.raises(ValueError, match="machine 'h80' is unknown: did you mean 'h800'"):
        load_machine("h80")


def searched(world: int, memory: float = 0.0, keep: int = 1000):
    trainer = TrainerConfig(rows_per_step=4, gradient_accumulation=16, bf16=True)
    config = Config(model=model_preset("mini"), trainer=trainer)
    return config, search("mini", config, load_machine("h100"), world, memory, keep)


def test_search_finds_what_fits_fastest_first():
    config, found = searched(8, memory=12)
    assert found.tried > len(found.plans) > 10
    times = [plan.time.total for plan in found.plans]
    assert times == sorted(times)
    for plan in found.plans:
        assert plan.needed(plan.fullest.memory) <= 12 and plan.layout.world == 8
        assert plan.tokens == 4 * 16 * 8 * config.model.max_sequence_length
    assert {plan.layout.tensor for plan in found.plans} >= {1, 2}
    assert any("parallel.tensor=2" in overrides(plan.config) for plan in found.plans)


def test_search_names_the_closest_where_nothing_fits():
    _, found = searched(8, memory=4.2)
    assert found.plans == [] and found.closest.needed(found.closest.fullest.memory) > 4.2
    _, larger = searched(8, memory=found.closest.needed(found.closest.fullest.memory) + 0.01)
    assert len(larger.plans) >= 1


def test_a_quick_plan_sees_the_fullest_and_the_slowest_stage():
    config = Config(model=dataclasses.replace(model_preset("ernie5-trillion"), num_layers=60, max_sequence_length=8192))
    config.parallel = ParallelConfig(tensor=4, pipeline=12, virtual_stages=5, expert=64, sharding=16)
    config.trainer = TrainerConfig(rows_per_step=1, gradient_accumulation=24)
    whole, quick = (make_plan("t", config, load_machine("h800"), 768, quick=q) for q in (False, True))
    assert quick.fullest == whole.fullest and quick.time == whole.time
