"""Seconds of a step: products at the rate a device reaches, messages that nothing hides, the pipeline's bubble.

A micro-batch costs each stage forward, backward (twice the operations) and, where blocks are recomputed, forward again;
the slowest stage sets the pace of (m + (P-1)/v) turns. Expert loads are taken as even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ernie5.config import Config, block_flops, expert_flops, head_flops
from ernie5.planning.communication import StageTraffic, Traffic
from ernie5.planning.layout import Layout, micro_batches
from ernie5.planning.machine import Machine
from ernie5.planning.memory import StageMemory
from ernie5.planning.shards import held_by_stage, owned_by_stage

# How often memory is passed for a value that waits for its backward pass: written (which first fetches the line) and
# read by the next operator; then it is read, its gradient written, and that read for the inputs and for the weights.
FORWARD_PASSES, BACKWARD_PASSES = 3, 5
SUB_BATCH_PASSES = 7
# Over the logits beyond these where ranks share the vocabulary, by operator (ernie5/parallel/gloo.py): maximum,
# difference, exponential, sum, quotient; then one-hot labels, masked, subtracted, scaled.
SPLIT_LOSS_PASSES = 19


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest stage; they add up to ``total``."""

    compute: float
    traffic: float  # of activations, outside products
    overhead: float  # dispatch of operators, whatever their size
    communication: float  # exposed
    optimizer: float
    bubble: float

    @property
    def total(self) -> float:
        return self.compute + self.traffic + self.overhead + self.communication + self.optimizer + self.bubble


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
    compute, passing = _compute(config, layout, machine, stage), _traffic(config, layout, machine, stage)
    overhead = _overhead(config, layout, machine, stage)
    repeated = sum(t.exposed for t in traffic if t.each_micro_batch)
    once = sum(t.exposed for t in traffic if not t.each_micro_batch)
    turn = compute + passing + overhead + repeated / count
    bubble = idle * turn * machine.idle_share(layout.stage_ranks, layout.world)
    update = _update(config, layout, machine, stage)
    time = StepTime(compute * count, passing * count, overhead * count, repeated + once, update, bubble)
    return time, traffic


def _blocks(config: Config, layout: Layout, stage: int) -> int:
    return sum(map(len, layout.stage_chunks(stage, config.model.num_layers)))


def _compute(config: Config, layout: Layout, machine: Machine, stage: int) -> float:
    """Seconds of one micro-batch: products, or reading the weights where those are many and the tokens few."""
    model, trainer = config.model, config.trainer
    local = trainer.rows_per_step * model.max_sequence_length / (layout.context * layout.tensor)
    passes, block = (4 if model.recompute else 3), block_flops(model, model.max_sequence_length)
    blocks, ahead = _blocks(config, layout, stage), model.mtp_depth if stage == layout.pipeline - 1 else 0
    flops = local * block * (passes * blocks + 3 * ahead)
    if stage == layout.pipeline - 1:
        flops += local * 3 * head_flops(model)
    if 0 < model.moe_sub_batch < local:
        flops += local * (blocks + ahead) * expert_flops(model)
    held = held_by_stage(model, layout, stage).total * machine.bytes_of.parameter
    return max(flops / machine.flops_of_process(layout.world), passes * held / _bandwidth(machine, layout))


def _traffic(config: Config, layout: Layout, machine: Machine, stage: int) -> float:
    """Seconds of one micro-batch in which everything but products reads and writes activations, one core a process.

    Expert sub-batches read the weights and add to the gradients once each: three reads, then the new gradient is
    written, read, and added.
    """
    memory = StageMemory(config, layout, machine.bytes_of, stage)
    blocks = memory.blocks + (config.model.mtp_depth if memory.last else 0)
    again = FORWARD_PASSES / (FORWARD_PASSES + BACKWARD_PASSES)
    times = blocks + again * memory.blocks * config.model.recompute
    heads = memory.kept_of_heads - (config.model.mtp_depth * memory.kept_of_block if memory.last else 0)
    size = times * memory.made_by_block + heads
    passed = machine.activation_passes * size
    if memory.last and layout.tensor > 1:
        passed += SPLIT_LOSS_PASSES * memory.logits * (1 + config.model.mtp_depth)
    seconds = machine.seconds_of_passes(passed, layout.world)
    if memory.sub_batched:
        parts = math.ceil(memory.local / config.model.moe_sub_batch)
        experts = memory.block.experts * machine.bytes_of.parameter
        seconds += (parts - 1) * blocks * SUB_BATCH_PASSES * experts / _bandwidth(machine, layout)
    return seconds


def _overhead(config: Config, layout: Layout, machine: Machine, stage: int) -> float:
    blocks, passes = _blocks(config, layout, stage), 4 if config.model.recompute else 3
    if stage == layout.pipeline - 1:
        blocks += config.model.mtp_depth + 1  # the heads cost about as much
    if layout.expert > 1 and layout.dispatcher != "deepep":
        blocks += _blocks(config, layout, stage) * (passes - 2) / passes  # which row goes where, in each forward pass
    return passes * blocks * machine.block_overhead * machine.crowd(layout.world)


def _update(config: Config, layout: Layout, machine: Machine, stage: int) -> float:
    """AdamW reads and writes parameters and state, and reads gradients."""
    own, size = owned_by_stage(config.model, layout, stage).total, machine.bytes_of
    return own * (2 * (size.parameter + size.optimizer) + size.gradient) / _bandwidth(machine, layout)


def _bandwidth(machine: Machine, layout: Layout) -> float:
    """Bytes a second of all that a process may use."""
    whole = machine.memory_bandwidth * 1e9
    return whole * machine.devices_per_node / layout.world if machine.shared else whole
