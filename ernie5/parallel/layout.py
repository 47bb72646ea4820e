"""Which rank does what: coordinates and groups of ranks, as pure arithmetic on the degrees of ``ParallelConfig``.

A stage of the pipeline holds F = data x sharding x context x tensor ranks, numbered f with tensor running fastest.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from functools import cached_property

from ernie5.config.schema import ParallelConfig

AXES = ("data", "pipeline", "sharding", "context", "tensor")  # slowest first, as Fleet numbers ranks


def world_size() -> int:
    """Processes of this run, as ``paddle.distributed.launch`` set them; 1 without it."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


@dataclass(frozen=True)
class Coordinates:
    data: int
    pipeline: int
    sharding: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """``ranks`` processes under ``config``. Raises a one-line ``ValueError`` if they do not fit."""

    config: ParallelConfig
    ranks: int

    def __post_init__(self) -> None:
        c = self.config
        if self.ranks % self._product:
            raise ValueError(
                f"parallel: tensor {c.tensor} x pipeline {c.pipeline} x context {c.context} x sharding {c.sharding} = "
                f"{self._product} does not divide the {self.ranks} processes of this run; start a multiple of "
                f"{self._product}, or change a degree"
            )
        if self.stage_ranks % c.expert:
            raise ValueError(
                f"parallel.expert = {c.expert} does not divide data {self.data} x sharding {c.sharding} x context "
                f"{c.context} x tensor {c.tensor} = {self.stage_ranks} ranks of a stage; choose a divisor"
            )

    @property
    def _product(self) -> int:
        c = self.config
        return c.tensor * c.pipeline * c.context * c.sharding

    @property
    def data(self) -> int:
        return self.ranks // self._product

    @property
    def stage_ranks(self) -> int:
        """F, the ranks of one stage."""
        return self.ranks // self.config.pipeline

    @property
    def rows(self) -> int:
        """How many ranks read rows of their own."""
        return self.data * self.config.sharding

    @cached_property
    def coordinates(self) -> list[Coordinates]:
        """By rank."""
        c = self.config
        degrees = (self.data, c.pipeline, c.sharding, c.context, c.tensor)
        return [Coordinates(*place) for place in itertools.product(*map(range, degrees))]

    def rank_of(self, place: Coordinates) -> int:
        return self.coordinates.index(place)

    def flat(self, rank: int) -> int:
        """f, the rank's number within its stage."""
        c, place = self.config, self.coordinates[rank]
        return ((place.data * c.sharding + place.sharding) * c.context + place.context) * c.tensor + place.tensor

    def row_of(self, rank: int) -> int:
        """Which share of the rows the rank reads."""
        return self.coordinates[rank].data * self.config.sharding + self.coordinates[rank].sharding

    def at(self, stage: int, flat: int) -> int:
        """The rank at number ``flat`` of a stage."""
        return next(r for r, place in enumerate(self.coordinates) if place.pipeline == stage and self.flat(r) == flat)

    def along(self, *axes: str) -> list[list[int]]:
        """The groups of ranks that differ in these axes alone, each ascending."""
        fixed = [axis for axis in AXES if axis not in axes]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(self.coordinates):
            groups.setdefault(tuple(getattr(place, axis) for axis in fixed), []).append(rank)
        return list(groups.values())

    def stages(self) -> list[list[int]]:
        """The ranks of each stage, by f."""
        return [[self.at(stage, f) for f in range(self.stage_ranks)] for stage in range(self.config.pipeline)]

    def experts(self) -> list[list[int]]:
        """Groups that share the experts: ``expert`` consecutive ranks of a stage."""
        size = self.config.expert
        return [stage[i : i + size] for stage in self.stages() for i in range(0, len(stage), size)]

    def expert_replicas(self) -> list[list[int]]:
        """Groups of ranks that hold the same experts."""
        size = self.config.expert
        return [stage[i::size] for stage in self.stages() for i in range(size)]

    def tied(self, stages: list[int]) -> list[list[int]]:
        """Groups of the ranks at the same place f of these stages."""
        return [[self.at(stage, f) for stage in stages] for f in range(self.stage_ranks)]

    # ------------------------------------------------------------------ the pipeline

    def blocks(self, stage: int, num_layers: int) -> list[list[int]]:
        """The blocks of each piece of the model that a stage holds."""
        c = self.config
        size = num_layers // (c.pipeline * c.virtual_stages)
        firsts = [(piece * c.pipeline + stage) * size for piece in range(c.virtual_stages)]
        return [list(range(first, first + size)) for first in firsts]

    def stage_of(self, block: int, num_layers: int) -> int:
        c = self.config
        return block // (num_layers // (c.pipeline * c.virtual_stages)) % c.pipeline
