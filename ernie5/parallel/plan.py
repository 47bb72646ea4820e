"""The plan: what is split over which ranks, by parameter name. One table, applied to the single-device model.

``split`` and ``join`` are the two directions between a whole parameter and the parts of its ranks.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from ernie5.checkpoint.part import Part

if TYPE_CHECKING:
    from paddle.distributed.communication.group import Group

    from ernie5.parallel.topology import Topology


class Kind(Enum):
    COLUMN = "outputs over the tensor ranks"
    GATED_COLUMN = "outputs over the tensor ranks, gate and up alike"
    ROW = "inputs over the tensor ranks"
    VOCAB = "rows of the vocabulary over the tensor ranks"
    EXPERT = "experts over the expert ranks"
    REPLICATE = "the same on every rank"


PLAN: tuple[tuple[str, Kind], ...] = (  # first match wins
    ("*attention.q_proj.weight", Kind.COLUMN),
    ("*attention.k_proj.weight", Kind.COLUMN),
    ("*attention.v_proj.weight", Kind.COLUMN),
    ("*attention.o_proj.weight", Kind.ROW),
    ("*moe.shared.gate_up", Kind.GATED_COLUMN),
    ("*moe.shared.down", Kind.ROW),
    ("*moe.experts.gate_up", Kind.EXPERT),
    ("*moe.experts.down", Kind.EXPERT),
    ("embedding.tokens.weight", Kind.VOCAB),
    ("*", Kind.REPLICATE),
)
_AXIS = {Kind.COLUMN: 1, Kind.GATED_COLUMN: 1, Kind.ROW: 0, Kind.VOCAB: 0, Kind.EXPERT: 0}
TIED_TEXT, TIED_AUDIO = "embedding.tokens.weight", "embedding.audio.weight"


def kind_of(name: str) -> Kind:
    """What the plan says of the parameter ``name``."""
    return next(kind for pattern, kind in PLAN if fnmatch.fnmatchcase(name, pattern))


def part_of(kind: Kind, shape: Sequence[int], part: int, parts: int) -> Part:
    """Where part ``part`` of ``parts`` lies in a parameter of ``shape``."""
    if kind is Kind.REPLICATE or parts == 1:
        return Part(tuple(shape))
    axis, pieces = _AXIS[kind], 2 if kind is Kind.GATED_COLUMN else 1
    width = shape[axis] // (pieces * parts)
    assert width * pieces * parts == shape[axis], f"{list(shape)} does not split into {parts} parts along {axis}"
    starts = [(piece * parts + part) * width for piece in range(pieces)]
    return Part(tuple(shape), axis, tuple((start, start + width) for start in starts))


def split(kind: Kind, whole: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Part ``part`` of ``parts`` of a whole parameter; a view where it can be."""
    return part_of(kind, whole.shape, part, parts).of(whole)


def join(kind: Kind, parts: list[np.ndarray]) -> np.ndarray:
    """The whole parameter of its parts, in order."""
    if kind is Kind.REPLICATE or len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[_AXIS[kind]] *= len(parts)
    whole = np.empty(shape, parts[0].dtype)
    for number, value in enumerate(parts):
        part_of(kind, shape, number, len(parts)).put(value, whole)
    return whole


@dataclass(frozen=True)
class Placement:
    """Where the parts and the copies of one parameter are, seen from this rank."""

    name: str  # global
    kind: Kind
    part: int
    parts: int
    replicas: Group | None  # ranks of this stage that hold the same part and see other tokens
    shards: Group | None  # those of them that divide the optimizer state (ZeRO), see ``ownership.py``
    owners: Group | None  # those of them that keep the same share of it
    tied: Group | None  # ranks of other stages that hold the same part
    copies: int  # ranks of the whole run that hold this part


def placement(name: str, topology: Topology) -> Placement:
    """Raises nothing: the plan's last line matches every name."""
    kind, layout, config = kind_of(name), topology.layout, topology.config
    tied, stages = None, 1
    if name == TIED_TEXT:
        tied, stages = topology.tied_text, len(topology.text_stages)
    elif name == TIED_AUDIO:
        tied, stages = topology.tied_audio, len(topology.audio_stages)
    if kind is Kind.EXPERT:
        part, copies = layout.flat(topology.rank) % config.expert, layout.stage_ranks // config.expert
        replicas = topology.expert_replicas
        shards = replicas if config.sharding > 1 else None
        return Placement(name, kind, part, config.expert, replicas, shards, None, None, copies)
    shards = topology.sharding
    if kind is Kind.REPLICATE or config.tensor == 1:
        copies = layout.stage_ranks * stages
        return Placement(name, kind, 0, 1, topology.stage, shards, topology.owners, tied, copies)
    copies = layout.stage_ranks // config.tensor * stages
    groups = topology.split_replicas, shards, topology.split_owners
    return Placement(name, kind, topology.place.tensor, config.tensor, *groups, tied, copies)
