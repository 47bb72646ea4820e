"""Seconds of a step: products at the rate a device reaches, messages that nothing hides, the pipeline's bubble.

A product takes its operations at the rate of a large one, and, where a machine says so, its operands' way to and from
memory on top: that is most of it where few values are multiplied with each other, and all that bfloat16 only halves.
A micro-batch costs each stage forward, backward (twice the operations) and, where blocks are recomputed, forward again;
the slowest stage sets the pace of m turns; the pipeline fills and drains through a v-th of a turn of every other one.
Expert loads are taken as even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ernie5.config import Config, block_flops, expert_flops, head_flops, score_flops
from ernie5.planning.communication import StageTraffic, Traffic
from ernie5.planning.layout import Layout, micro_batches
from ernie5.planning.machine import PRECISIONS, Machine
from ernie5.planning.memory import StageMemory
from ernie5.planning.shards import (
    block_operands,
    expert_operands,
    head_operands,
    held_by_block,
    held_by_stage,
    owned_by_stage,
)

# How often memory is passed, beside products, for a value that waits for its backward pass. Between two operators it is
# written (which first fetches the line) and read, then read again, its gradient written, and that read for the inputs
# and for the weights: 3 and 5. Most lie between a product, whose passes are counted with its operands, and another.
FORWARD_PASSES, BACKWARD_PASSES = 2, 3
# Of the gradient of the token table, which each look-up makes (cleared, which fetches it first) and adds (two read, one
# written) and each head adds.
LOOK_UP_PASSES, HEAD_PASSES = 5, 3
# Over the experts' gradients for an expert sub-batch more: the new one is written, read, and added.
SUM_PASSES = 4
# Over the logits beyond these where ranks share the vocabulary, by operator (ernie5/parallel/gloo.py): maximum,
# difference, exponential, sum, quotient; then one-hot labels, masked, subtracted, scaled. These are 19, but maximum and
# exponential compute for longer: in profiles on two cores all took as long as 44 and 46 (logits of 33 and 17 MB).
SPLIT_LOSS_PASSES = 45


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


def turn_seconds(config: Config, layout: Layout, machine: Machine, stage: int) -> float:
    """Seconds of a micro-batch in a stage, forward and backward, with the messages that nothing hides."""
    repeated = sum(t.exposed for t in StageTraffic(config, layout, machine, stage).all() if t.each_micro_batch)
    own = sum(part(config, layout, machine, stage) for part in (_compute, _traffic, _overhead))
    return own + repeated / micro_batches(config.trainer)


def stage_time(
    config: Config, layout: Layout, machine: Machine, stage: int, others: float
) -> tuple[StepTime, list[Traffic]]:
    """The time of a step that this stage sets the pace of, and its messages.

    ``others``: ``turn_seconds`` of all other stages together, which the first and the last micro-batch pass through.
    That is exact for the last stage, which has the heads; an earlier one waits less.
    """
    count = micro_batches(config.trainer)
    traffic = StageTraffic(config, layout, machine, stage).all()
    compute, passing = _compute(config, layout, machine, stage), _traffic(config, layout, machine, stage)
    overhead = _overhead(config, layout, machine, stage)
    exposed = sum(t.exposed for t in traffic)
    bubble = others / layout.virtual * machine.idle_share(layout.stage_ranks, layout.world)
    update = _update(config, layout, machine, stage)
    return StepTime(compute * count, passing * count, overhead * count, exposed, update, bubble), traffic


def _blocks(config: Config, layout: Layout, stage: int) -> int:
    return sum(map(len, layout.stage_chunks(stage, config.model.num_layers)))


def _compute(config: Config, layout: Layout, machine: Machine, stage: int) -> float:
    """Seconds of one micro-batch: products, or reading the weights where those are many and the tokens few."""
    model, trainer = config.model, config.trainer
    local = trainer.rows_per_step * model.max_sequence_length // (layout.context * layout.tensor)
    scores = score_flops(model, model.max_sequence_length)
    passes, block = (4 if model.recompute else 3), block_flops(model, model.max_sequence_length) - scores
    blocks, ahead = _blocks(config, layout, stage), model.mtp_depth if stage == layout.pipeline - 1 else 0
    times = passes * blocks + 3 * ahead
    flops, values = local * block * times, block_operands(model, layout, local) * times
    if stage == layout.pipeline - 1:
        flops += local * 3 * head_flops(model)
        values += 3 * head_operands(model, layout, local)
    if 0 < model.moe_sub_batch < local:
        # Experts run forward once more than their block, which may be computed again itself.
        flops += local * (blocks + ahead) * expert_flops(model)
        values += (blocks + ahead) * expert_operands(model, layout, local)
        again = (_sub_batches(config, local) - 1) * held_by_block(model, layout).experts
        values += ((passes + 1) * blocks + 4 * ahead) * again
    bandwidth, size = machine.bandwidth_of_process(layout.world), machine.bytes_of
    seconds = flops / machine.flops_of_process(layout.world)
    seconds += machine.operand_passes * values * size.activation / bandwidth
    seconds += local * scores * _latest(layout) * times / machine.attention_flops_of_process(layout.world)
    held = held_by_stage(model, layout, stage).total * size.parameter
    return max(seconds, passes * held / bandwidth)


def _sub_batches(config: Config, local: int) -> int:
    return math.ceil(local / config.model.moe_sub_batch)


def _latest(layout: Layout) -> float:
    """Scores of the context rank with the end of every row, over those of an even share: it sees all that is before."""
    return 2 - 1 / layout.context


def _traffic(config: Config, layout: Layout, machine: Machine, stage: int) -> float:
    """Seconds of one micro-batch in which everything but products reads and writes activations.

    Values take as long in bfloat16 as in float32: our operators take two thirds of it, Paddle's casts and gradients of
    look-ups two to three times as long (profiles of a step on two cores).
    Expert sub-batches add to the gradients once each, and read the weights, where that is not with the products.
    """
    memory = StageMemory(config, layout, PRECISIONS["float32"], stage)
    blocks = memory.blocks + (config.model.mtp_depth if memory.last else 0)
    again = FORWARD_PASSES / (FORWARD_PASSES + BACKWARD_PASSES)
    times = blocks + again * memory.blocks * config.model.recompute
    heads = memory.kept_of_heads - (config.model.mtp_depth * memory.kept_of_block if memory.last else 0)
    size = times * memory.made_by_block + heads
    passed = machine.activation_passes * size
    if memory.last and layout.tensor > 1:
        passed += SPLIT_LOSS_PASSES * memory.logits * (1 + config.model.mtp_depth)
    if machine.activation_passes:
        tables = (memory.stage == 0) * LOOK_UP_PASSES + memory.last * HEAD_PASSES
        tables += memory.last * config.model.mtp_depth * (LOOK_UP_PASSES + HEAD_PASSES)
        passed += tables * memory.table
    seconds = machine.seconds_of_passes(passed, layout.world)
    if memory.sub_batched:
        parts, passes = _sub_batches(config, memory.local), SUM_PASSES
        passes += 0 if machine.operand_passes else 3 + config.model.recompute  # forward, and for the inputs' gradient
        experts = memory.block.experts * machine.bytes_of.parameter
        bandwidth = machine.bandwidth_of_process(layout.world)
        seconds += (parts - 1) * blocks * passes * experts / bandwidth
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
    moved = own * (2 * (size.parameter + size.optimizer) + size.gradient)
    return moved / machine.bandwidth_of_process(layout.world)
