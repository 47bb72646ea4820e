"""Seconds of a step: products at the rate a device reaches, messages that nothing hides, the pipeline's bubble.

A micro-batch costs each stage forward, backward (twice the operations) and, where blocks are recomputed, forward again;
the slowest stage sets the pace of (m + (P-1)/v) turns. Expert loads are taken as even.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie5.config import Config, block_flops, head_flops
from ernie5.planning.communication import StageTraffic, Traffic
from ernie5.planning.layout import Layout, micro_batches
from ernie5.planning.machine import Machine
from ernie5.planning.shards import held_by_stage, owned_by_stage


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest stage; they add up to ``total``."""

    compute: float
    overhead: float  # dispatch of operators, whatever their size
    communication: float  # exposed
    optimizer: float
    bubble: float

    @property
    def total(self) -> float:
        return self.compute + self.overhead + self.communication + self.optimizer + self.bubble


def step_flops(config: Config, layout: Layout) -> float:
    """Operations of all ranks in one step that serve the model: forward and backward, nothing done twice."""
    model = config.model
    token = (model.num_layers + model.mtp_depth) * block_flops(model, model.max_sequence_length) + head_flops(model)
    return 3.0 * token * step_tokens(config, layout)


def step_tokens(config: Config, layout: Layout) -> int:
    """Positions of all rows of one step."""
    trainer = config.trainer
    rows = trainer.rows_per_step * micro_batches(trainer) * layout.batch_ranks
    return rows * config.model.max_sequence_length


def stage_time(config: Config, layout: Layout, machine: Machine, stage: int) -> tuple[StepTime, list[Traffic]]:
    """The time a step would take if every stage were like this one, and its messages."""
    count, idle = micro_batches(config.trainer), (layout.pipeline - 1) / layout.virtual
    traffic = StageTraffic(config, layout, machine, stage).all()
    compute, overhead = _compute(config, layout, machine, stage), _overhead(config, layout, machine, stage)
    repeated = sum(t.exposed for t in traffic if t.each_micro_batch)
    once = sum(t.exposed for t in traffic if not t.each_micro_batch)
    turn = compute + overhead + repeated / count
    update = _update(config, layout, machine, stage)
    time = StepTime(compute * count, overhead * count, repeated + once, update, idle * turn)
    return time, traffic


def _blocks(config: Config, layout: Layout, stage: int) -> int:
    return sum(map(len, layout.stage_chunks(stage, config.model.num_layers)))


def _compute(config: Config, layout: Layout, machine: Machine, stage: int) -> float:
    """Seconds of one micro-batch: products, or reading the weights where those are many and the tokens few."""
    model, trainer = config.model, config.trainer
    local = trainer.rows_per_step * model.max_sequence_length / (layout.context * layout.tensor)
    passes, block = (4 if model.recompute else 3), block_flops(model, model.max_sequence_length)
    flops = local * passes * _blocks(config, layout, stage) * block
    if stage == layout.pipeline - 1:
        flops += local * 3 * (head_flops(model) + model.mtp_depth * block)
    held = held_by_stage(model, layout, stage).total * machine.bytes_of.parameter
    return max(flops / machine.flops_of_process(layout.world), passes * held / _bandwidth(machine, layout))


def _overhead(config: Config, layout: Layout, machine: Machine, stage: int) -> float:
    blocks, passes = _blocks(config, layout, stage), 4 if config.model.recompute else 3
    if stage == layout.pipeline - 1:
        blocks += config.model.mtp_depth + 1  # the heads cost about as much
    crowd = max(1.0, layout.world / machine.devices_per_node) if machine.shared else 1.0
    return passes * blocks * machine.block_overhead * crowd


def _update(config: Config, layout: Layout, machine: Machine, stage: int) -> float:
    """AdamW reads and writes parameters and state, and reads gradients."""
    own, size = owned_by_stage(config.model, layout, stage).total, machine.bytes_of
    return own * (2 * (size.parameter + size.optimizer) + size.gradient) / _bandwidth(machine, layout)


def _bandwidth(machine: Machine, layout: Layout) -> float:
    whole = machine.memory_bandwidth * 1e9
    return whole * machine.devices_per_node / layout.world if machine.shared else whole
