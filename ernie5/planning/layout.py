"""Which rank does what: degrees against a number of processes, blocks over pipeline stages, groups over nodes.

Ranks are numbered with the tensor axis innermost: rank = (((data * P + pipeline) * Z + sharding) * C + context) * T +
tensor, the order of Fleet's hybrid topology (data, pipe, sharding, sep, model).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ernie5.config import ModelConfig, ParallelConfig, TrainerConfig


@dataclass(frozen=True)
class Layout:
    """Degrees of every axis for ``world`` processes. Build it with ``Layout.of``, which checks that they divide."""

    world: int
    data: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    sharding: int
    sharding_stage: int
    expert: int
    dispatcher: str

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int = 0) -> Layout:
        """``world`` = 0: the fewest processes this layout can have. ``ValueError`` where the degrees do not divide."""
        product = parallel.tensor * parallel.pipeline * parallel.context * parallel.sharding
        world = world or smallest_world(parallel)
        if world % product:
            raise ValueError(
                f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} x "
                f"sharding {parallel.sharding} = {product} does not divide {world} processes; start a multiple of it"
            )
        stage_ranks = world // parallel.pipeline
        if stage_ranks % parallel.expert:
            raise ValueError(
                f"parallel.expert = {parallel.expert} does not divide the {stage_ranks} ranks of a pipeline stage "
                f"({world} processes / pipeline {parallel.pipeline}); start a multiple of {smallest_world(parallel)}"
            )
        return cls(
            world,
            world // product,
            parallel.tensor,
            parallel.pipeline,
            parallel.virtual_stages,
            parallel.context,
            parallel.sharding,
            parallel.sharding_stage,
            parallel.expert,
            parallel.dispatcher,
        )

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world // self.pipeline

    @property
    def batch_ranks(self) -> int:
        """Parts the rows of a batch are divided into."""
        return self.data * self.sharding

    @property
    def dense_replicas(self) -> int:
        """Ranks that hold the same part of what the tensor ranks divide, and add up its gradient."""
        return self.data * self.sharding * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same routed experts."""
        return self.stage_ranks // self.expert

    @property
    def expert_sharding(self) -> int:
        """Ranks among which ZeRO divides the state of the routed experts: all that hold the same ones."""
        return self.expert_replicas if self.sharding > 1 else 1

    def chunks(self, layers: int) -> list[range]:
        """Blocks of every chunk in the order of the network, equally many; chunk c belongs to stage c % pipeline."""
        count = self.pipeline * self.virtual
        assert layers % count == 0, "validation sees to it that the blocks divide"
        return [range(first, first + layers // count) for first in range(0, layers, layers // count)]

    def stage_chunks(self, stage: int, layers: int) -> list[range]:
        """The chunks of one stage."""
        return self.chunks(layers)[stage :: self.pipeline]

    def in_flight(self, stage: int, micro_batches: int) -> int:
        """Chunk activations a stage holds at most: 1F1B, or the interleaved schedule (arXiv 2104.04473 §2.2).

        A stage starts as many forward passes ahead as lie between it and the end, and holds one more while it works.
        """
        if self.pipeline == 1:
            return 1
        if self.virtual == 1:
            return min(self.pipeline - stage, micro_batches)
        ahead = 2 * (self.pipeline - stage - 1) + (self.virtual - 1) * self.pipeline
        return min(ahead + 1, micro_batches * self.virtual)

    def bubble(self, micro_batches: int) -> float:
        """Share of a step in which one of equal stages waits: (P-1)/v of m + (P-1)/v turns (arXiv 2104.04473 eq. 1)."""
        idle = (self.pipeline - 1) / self.virtual
        return idle / (micro_batches + idle)

    def span(self, group: str) -> int:
        """Ranks from the first to the last of a group of ``group``; it lies in one node if that holds as many."""
        stage = self.tensor * self.context * self.sharding  # neighbouring ranks of one stage
        whole = {
            "tensor": self.tensor,
            "context": self.tensor * self.context,
            "sharding": stage,
            "pipeline": 2 * stage,  # a rank and its neighbour
            "ends": self.pipeline * stage,  # first and last stage
            "dense": stage if self.data == 1 else self.world,
            "expert": self.expert if self.expert <= stage else self.world,
            "expert_replicas": stage if self.data == 1 else self.world,
        }
        return whole[group]


def smallest_world(parallel: ParallelConfig) -> int:
    """The fewest processes that hold every axis once and a whole expert group in each stage."""
    inner = parallel.tensor * parallel.context * parallel.sharding
    return parallel.pipeline * inner * (parallel.expert // math.gcd(parallel.expert, inner))


def local_experts(model: ModelConfig, layout: Layout) -> int:
    """Routed experts of a block on one rank."""
    return model.num_experts // layout.expert


def ranks_of_a_token(model: ModelConfig, layout: Layout) -> float:
    """Expected number of expert ranks that hold one of a token's experts, all choices equally likely."""
    elsewhere = model.num_experts - local_experts(model, layout)
    missed = math.comb(elsewhere, model.experts_per_token) / math.comb(model.num_experts, model.experts_per_token)
    return layout.expert * (1.0 - missed)


def micro_batches(trainer: TrainerConfig) -> int:
    """Of one step, once the batch has grown to its full size."""
    return trainer.batch_ramp[-1][1] if trainer.batch_ramp else trainer.gradient_accumulation
