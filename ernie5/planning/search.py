"""Layouts of a number of devices that fit their memory, fastest first, for the batch that a configuration asks for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tqdm import tqdm

from ernie5.config import Config, ParallelConfig
from ernie5.planning.layout import Layout, micro_batches
from ernie5.planning.machine import Machine
from ernie5.planning.plan import Plan, make_plan

ROWS = (1, 2, 4, 8)  # of a micro-batch
LONG = 32768  # positions from which a sequence may be worth dividing


@dataclass(frozen=True)
class Found:
    """What a search saw: plans that fit, fastest first, and how many layouts were tried."""

    plans: list[Plan]
    tried: int
    closest: Plan | None  # of those that do not fit, the one that needs least memory


def search(name: str, config: Config, machine: Machine, world: int, memory: float = 0.0, keep: int = 10) -> Found:
    """Tries degrees, chunks, rows of a micro-batch and recomputation; ZeRO takes every data-parallel rank.

    The positions of a step stay those of ``config`` in its own layout. ``memory`` GB of a device replace the machine's.
    """
    if memory:
        whole = memory * world if machine.shared else memory
        machine = dataclasses.replace(machine, memory=whole)
    rows = config.trainer.rows_per_step * micro_batches(config.trainer)
    rows *= Layout.of(config.parallel, 0 if world % _ranks(config.parallel) else world).batch_ranks
    candidates = list(_candidates(config, machine, world, rows))
    fitting, closest = [], None
    for candidate in tqdm(candidates, "layouts", leave=False, disable=None):  # silent where nobody looks
        plan = make_plan(name, candidate, machine, world, quick=True)
        if plan.fits:
            fitting.append(plan)
        elif closest is None or plan.needed(plan.fullest.memory) < closest.needed(closest.fullest.memory):
            closest = plan
    fitting.sort(key=lambda plan: (plan.time.total, plan.needed(plan.fullest.memory)))
    return Found(
        [make_plan(name, plan.config, machine, world) for plan in _distinct(fitting, keep)], len(candidates), closest
    )


def overrides(config: Config) -> list[str]:
    """The words behind a command line that choose this layout."""
    words = [
        f"parallel.{field.name}={getattr(config.parallel, field.name)}" for field in dataclasses.fields(ParallelConfig)
    ]
    words.append(f"trainer.rows_per_step={config.trainer.rows_per_step}")
    words.append(f"trainer.gradient_accumulation={config.trainer.gradient_accumulation}")
    return [*words, f"model.recompute={str(config.model.recompute).lower()}"]


def _ranks(parallel: ParallelConfig) -> int:
    return parallel.tensor * parallel.pipeline * parallel.context * parallel.sharding


def _distinct(plans: list[Plan], keep: int) -> list[Plan]:
    """The best plan of every combination of degrees; rows and recomputation of the others are variants of it."""
    best: dict[tuple, Plan] = {}
    for plan in plans:
        best.setdefault(dataclasses.astuple(plan.layout), plan)
    return list(best.values())[:keep]


def _candidates(config: Config, machine: Machine, world: int, rows: int) -> Iterator[Config]:
    """Configurations of every layout that the model divides into and that keeps ``rows`` a step."""
    for parallel in _layouts(config, machine, world):
        batch_ranks = world // (parallel.tensor * parallel.pipeline * parallel.context)
        for micro in ROWS:
            if rows % (batch_ranks * micro):
                continue
            accumulation = rows // (batch_ranks * micro)
            if accumulation < parallel.pipeline * (2 if parallel.virtual_stages > 1 else 1) and parallel.pipeline > 1:
                continue
            trainer = dataclasses.replace(
                config.trainer, rows_per_step=micro, gradient_accumulation=accumulation, batch_ramp=[]
            )
            for recompute in (False, True):
                model = dataclasses.replace(config.model, recompute=recompute)
                yield dataclasses.replace(config, model=model, trainer=trainer, parallel=parallel)


def _layouts(config: Config, machine: Machine, world: int) -> Iterator[ParallelConfig]:
    """Degrees with every number of expert ranks and of chunks; the sharding ranks are all that read rows."""
    model, given = config.model, config.parallel
    for tensor, pipeline, context in _splits(config, machine, world):
        sharding = world // (tensor * pipeline * context)
        for expert in _divisors(math.gcd(world // pipeline, model.num_experts)):
            dispatcher = given.dispatcher if given.dispatcher != "local" or expert == 1 else "all_to_all"
            for virtual in _chunk_counts(model.num_layers, pipeline):
                yield ParallelConfig(
                    tensor=tensor,
                    pipeline=pipeline,
                    virtual_stages=virtual,
                    expert=expert,
                    context=context,
                    sharding=sharding,
                    dispatcher=dispatcher,
                )


def _splits(config: Config, machine: Machine, world: int) -> Iterator[tuple[int, int, int]]:
    """(tensor, pipeline, context) that divide the model; tensor ranks share a node, short sequences stay whole."""
    m = config.model
    widest = world if machine.shared else machine.devices_per_node
    length, long = m.max_sequence_length, m.max_sequence_length >= LONG
    for tensor in _divisors(
        math.gcd(m.num_heads, m.num_kv_heads, m.vocab_size, m.shared_expert_intermediate_size, world)
    ):
        if tensor > widest or length % tensor:
            continue
        for pipeline in _divisors(math.gcd(world // tensor, m.num_layers)):
            for context in _divisors(world // (tensor * pipeline)) if long else [1]:
                if length % (context * tensor) == 0:
                    yield tensor, pipeline, context


def _chunk_counts(layers: int, pipeline: int) -> list[int]:
    """Chunks of a stage worth trying: one, the fewest above that, and a block a chunk."""
    each = layers // pipeline
    several = [count for count in _divisors(each) if count > 1] if pipeline > 1 else []
    return sorted({1, *several[:1], *several[-1:]})


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
