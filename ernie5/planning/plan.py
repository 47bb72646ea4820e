"""``Plan``: what a configuration needs and how long a step takes, rank by rank, before anything is built."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ernie5.config import Config, num_params
from ernie5.planning.communication import Traffic
from ernie5.planning.layout import Layout, micro_batches
from ernie5.planning.machine import Machine
from ernie5.planning.memory import MILD_SKEW, RankMemory, StageMemory
from ernie5.planning.shards import Held, held_by_stage
from ernie5.planning.timing import StepTime, stage_time, step_flops, step_tokens, turn_seconds

GB = 1e9
BUSY = 0.9  # share of a device's memory above which a plan is called tight


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage; its ranks are alike."""

    stage: int
    blocks: int
    in_flight: int  # chunk activations at a time
    held: Held
    memory: RankMemory  # even expert load
    skewed: RankMemory  # the busiest rank's experts receive ``MILD_SKEW`` times their share
    worst: RankMemory  # every token of the expert group chooses experts of this rank


@dataclass(frozen=True)
class Plan:
    """Built by ``make_plan``."""

    name: str
    config: Config
    layout: Layout
    machine: Machine
    stages: list[StagePlan]
    time: StepTime  # of the slowest stage
    slowest: int
    traffic: list[Traffic]  # of the slowest stage

    @property
    def fullest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def tokens(self) -> int:
        """Positions of one step."""
        return step_tokens(self.config, self.layout)

    @property
    def flops(self) -> float:
        """Operations of one step that serve the model, all ranks."""
        return step_flops(self.config, self.layout)

    @property
    def utilisation(self) -> float:
        """Share of the devices' rate that serves the model."""
        whole = self.machine.flops * 1e12
        devices = self.machine.devices_per_node if self.machine.shared else self.layout.world
        return self.flops / self.time.total / (whole * devices)

    @property
    def bubble(self) -> float:
        """Share of the turns in which a stage waits."""
        return self.layout.bubble(micro_batches(self.config.trainer))

    def needed(self, memory: RankMemory) -> float:
        """GB of one process: tensors, what the allocator holds on top, and everything that is no tensor."""
        return memory.total * (1 + self.machine.slack) / GB + self.machine.reserve

    @property
    def limit(self) -> float:
        """GB a process may use."""
        return self.machine.memory_of_process(self.layout.world)

    @property
    def fits(self) -> bool:
        """With an even expert load."""
        return self.needed(self.fullest.memory) <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON: counts, bytes, seconds."""
        count = num_params(self.config.model)
        return {
            "name": self.name,
            "machine": self.machine.name,
            "layout": asdict(self.layout),
            "parameters": {"total": count.total, "active": count.active, **count.parts},
            "tokens_per_step": self.tokens,
            "flops_per_step": self.flops,
            "memory_limit_gb": self.limit,
            "needed_gb": self.needed(self.fullest.memory),
            "needed_gb_skewed": max(self.needed(stage.skewed) for stage in self.stages),
            "needed_gb_worst": max(self.needed(stage.worst) for stage in self.stages),
            "fits": self.fits,
            "bubble": self.bubble,
            "seconds_per_step": self.time.total,
            "seconds": asdict(self.time),
            "tokens_per_second": self.tokens / self.time.total,
            "utilisation": self.utilisation,
            "slowest_stage": self.slowest,
            "communication": [asdict(traffic) for traffic in self.traffic],
            "stages": [asdict(stage) for stage in self.stages],
        }


def make_plan(name: str, config: Config, machine: Machine, world: int = 0, quick: bool = False) -> Plan:
    """The plan of ``config`` for ``world`` processes, 0: the fewest that its layout can have.

    ``quick`` looks at the first two and the last two stages alone, among which the fullest and the slowest are.
    Raises ``ValueError`` where the degrees do not divide ``world``, or a machine without a network gets several nodes.
    """
    layout = Layout.of(config.parallel, world)
    machine = machine.computing_in("bfloat16" if config.trainer.bf16 else "float32")
    p = layout.pipeline
    chosen = sorted({0, min(1, p - 1), max(p - 2, 0), p - 1} if quick else range(p))
    stages = [_stage(config, layout, machine, stage) for stage in chosen]
    turns = {stage: turn_seconds(config, layout, machine, stage) for stage in chosen}
    left_out = (p - len(chosen)) * turns[min(1, p - 1)]  # those between are alike
    every = sum(turns.values()) + left_out
    times = {stage: stage_time(config, layout, machine, stage, every - turns[stage]) for stage in chosen}
    slowest = max(chosen, key=lambda stage: times[stage][0].total)
    return Plan(name, config, layout, machine, stages, times[slowest][0], slowest, times[slowest][1])


def _stage(config: Config, layout: Layout, machine: Machine, stage: int) -> StagePlan:
    even, mild, worst = (
        StageMemory(config, layout, machine.bytes_of, stage, skew) for skew in (1.0, MILD_SKEW, float("inf"))
    )
    flying = layout.in_flight(stage, micro_batches(config.trainer))
    held = held_by_stage(config.model, layout, stage)
    return StagePlan(stage, even.blocks, flying, held, even.peak(), mild.peak(), worst.peak())
