"""Which part of every parameter a rank holds: global name -> local shape, per pipeline stage.

All ranks of one stage hold parts of the same shapes, so a stage stands for its ranks.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from functools import lru_cache

from ernie5.config import ModelConfig
from ernie5.config.counting import Shapes, block_shapes, outer_shapes
from ernie5.parallel.ownership import share_out
from ernie5.planning.layout import Layout

TENSOR_AXES = {  # end of a name -> the axis that the tensor ranks divide
    "attention.q_proj.weight": 1,
    "attention.k_proj.weight": 1,
    "attention.v_proj.weight": 1,
    "attention.o_proj.weight": 0,
    "moe.shared.gate_up": 1,
    "moe.shared.down": 0,
    "embedding.tokens.weight": 0,
}
EXPERTS = "moe.experts."  # divided along axis 0 over the expert group, never by the tensor ranks
TIED = ("embedding.tokens.weight", "embedding.audio.weight")  # on every stage that uses them
HOME_OF_TOP = ("norm.", "bit_head.", "mtp.")  # what lies outside the blocks and belongs to the last stage


@dataclass(frozen=True)
class Held:
    """Numbers of parameters of one rank: those replicated over data ranks, and routed experts."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


def held_by_stage(model: ModelConfig, layout: Layout, stage: int) -> Held:
    """What a rank of ``stage`` holds. A tied table is on every stage that uses it, and counted on each."""
    return _held_by_stage(astuple(model), layout, stage)


@lru_cache(maxsize=4096)
def _held_by_stage(values: tuple, layout: Layout, stage: int) -> Held:
    model = ModelConfig(*values)
    block, blocks = held_by_block(model, layout), _blocks(model, layout, stage)
    outer = held_of({n: s for n, s in outer_shapes(model).items() if stage in _homes(n, model, layout)}, layout)
    return Held(blocks * block.dense + outer.dense, blocks * block.experts + outer.experts)


def held_by_block(model: ModelConfig, layout: Layout) -> Held:
    """A rank's part of one block."""
    return _held_by_block(astuple(model), layout)


@lru_cache(maxsize=4096)
def _held_by_block(values: tuple, layout: Layout) -> Held:
    return held_of(block_shapes(ModelConfig(*values)), layout)


@dataclass(frozen=True)
class Owned:
    """What ZeRO leaves of ``Held`` to the rank that owns most: numbers of parameters whose state it keeps."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


def owned_by_stage(model: ModelConfig, layout: Layout, stage: int) -> Owned:
    """By the table of ``ernie5.parallel.ownership``. Without ZeRO a rank keeps the state of all that it holds."""
    return _owned_by_stage(astuple(model), layout, stage)


@lru_cache(maxsize=4096)
def _owned_by_stage(values: tuple, layout: Layout, stage: int) -> Owned:
    model = ModelConfig(*values)
    if layout.sharding == 1:
        held = held_by_stage(model, layout, stage)
        return Owned(held.dense, held.experts)
    sizes = {name: math.prod(shape) for name, shape in stage_shapes(model, layout, stage).items()}
    spread = {name for name in sizes if EXPERTS in name}
    fixed = {name: place % layout.sharding for place, name in enumerate(TIED)}
    inner = layout.context * layout.tensor
    shared = share_out(sizes, spread, fixed, layout.stage_ranks, layout.sharding, inner, layout.expert)
    fullest = int((shared.dense + shared.experts).argmax())
    return Owned(int(shared.dense[fullest]), int(shared.experts[fullest]))


def block_operands(model: ModelConfig, layout: Layout, tokens: int) -> int:
    """Values that the products of one block's forward pass read and write: rows in and out, and every weight once.

    ``tokens`` are those a rank holds between attentions; a divided weight sees those of all tensor ranks, an expert
    K times its even share. Backward there are twice as many: those of two products, each with two of the three.
    """
    values = expert_operands(model, layout, tokens)
    for name, shape in block_shapes(model).items():
        if "norm" not in name and EXPERTS not in name:
            rows = tokens * (layout.tensor if name.endswith(tuple(TENSOR_AXES)) else 1)
            inner, outer = _local(name, shape, layout)
            values += rows * (inner + outer) + inner * outer
    return values


def expert_operands(model: ModelConfig, layout: Layout, tokens: int) -> int:
    """The part of ``block_operands`` of the routed experts."""
    rows, d, width = tokens * model.experts_per_token, model.hidden_size, model.expert_intermediate_size
    return rows * (2 * d + 3 * width) + held_by_block(model, layout).experts


def head_operands(model: ModelConfig, layout: Layout, tokens: int) -> int:
    """The same of the text head, once more with its projection for multi-token prediction."""
    d, classes = model.hidden_size, model.vocab_size // layout.tensor
    head = tokens * layout.tensor * (d + classes) + d * classes
    return (1 + model.mtp_depth) * head + model.mtp_depth * (tokens * 3 * d + 2 * d * d)


def replicated_in_tensor_group(model: ModelConfig, layout: Layout, stage: int) -> int:
    """Parameters of one rank that all tensor ranks hold whole, routed experts left out."""
    shapes = stage_shapes(model, layout, stage)
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if EXPERTS not in name and not name.endswith(tuple(TENSOR_AXES))
    )


def held_of(shapes: Shapes, layout: Layout) -> Held:
    """A rank's part of the parameters ``shapes``, global name -> global shape."""
    sizes = {name: math.prod(_local(name, shape, layout)) for name, shape in shapes.items()}
    experts = sum(size for name, size in sizes.items() if EXPERTS in name)
    return Held(sum(sizes.values()) - experts, experts)


def stage_shapes(model: ModelConfig, layout: Layout, stage: int) -> Shapes:
    """Global name -> local shape of everything a rank of ``stage`` holds."""
    homes = [f"layers.{i}." for chunk in layout.stage_chunks(stage, model.num_layers) for i in chunk]
    if stage == layout.pipeline - 1:
        homes += ["mtp.block."] * model.mtp_depth
    shapes = {home + name: shape for home in homes for name, shape in block_shapes(model).items()}
    shapes |= {name: shape for name, shape in outer_shapes(model).items() if stage in _homes(name, model, layout)}
    return {name: _local(name, shape, layout) for name, shape in shapes.items()}


def tied_parameters(model: ModelConfig, layout: Layout) -> int:
    """Of one rank, what other stages hold too and whose gradients are added up between stages."""
    return held_of({n: s for n, s in outer_shapes(model).items() if len(_homes(n, model, layout)) > 1}, layout).dense


def _blocks(model: ModelConfig, layout: Layout, stage: int) -> int:
    own = sum(len(chunk) for chunk in layout.stage_chunks(stage, model.num_layers))
    return own + (model.mtp_depth if stage == layout.pipeline - 1 else 0)


def _homes(name: str, model: ModelConfig, layout: Layout) -> set[int]:
    """Stages that use a parameter outside the blocks.

    The token table embeds on the first stage and is the text head of the last; the code table embeds on the first and
    feeds codes back between the top blocks, whose stages also hold the codec heads (report §2.3.2).
    """
    last, top = layout.pipeline - 1, model.num_layers - model.audio_levels
    if name.startswith(HOME_OF_TOP):
        return {last}
    if name.startswith("audio_heads."):
        return {_stage_of(top + int(name.split(".")[1]), model, layout)}
    if name == TIED[0]:
        return {0, last}
    if name == TIED[1]:  # the very last block's level is fed back to nobody
        return {0, *(_stage_of(i, model, layout) for i in range(top, model.num_layers - 1))}
    return {0}


def _stage_of(block: int, model: ModelConfig, layout: Layout) -> int:
    chunks = layout.chunks(model.num_layers)
    return next(c for c, chunk in enumerate(chunks) if block in chunk) % layout.pipeline


def _local(name: str, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    axis = next((axis for end, axis in TENSOR_AXES.items() if name.endswith(end)), None)
    if axis is not None:
        return _divided(name, shape, axis, layout.tensor)
    return _divided(name, shape, 0, layout.expert) if EXPERTS in name else shape


def _divided(name: str, shape: tuple[int, ...], axis: int, parts: int) -> tuple[int, ...]:
    assert shape[axis] % parts == 0, f"{name} {shape} does not divide by {parts}; validation should have refused"
    return (*shape[:axis], shape[axis] // parts, *shape[axis + 1 :])
