"""Builds every distinct part of the model as a rank would hold it, without memory, and compares it with the plan.

What a stage needs is read off the model's forward pass here, not off the plan's table, so that either can be wrong.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import paddle
from paddle import nn

from ernie5.config import ModelConfig
from ernie5.model import Ernie5Config
from ernie5.model.embedding import AudioEmbedding, Embedding
from ernie5.model.heads import AudioHead, BitHead, MultiTokenPrediction
from ernie5.model.layers import Block, Experts, RMSNorm
from ernie5.planning.layout import Layout, local_experts
from ernie5.planning.shards import held_by_stage, stage_shapes


@dataclasses.dataclass(frozen=True)
class Built:
    """One stage's part: how many tensors and parameters, and every difference from the plan, empty if none."""

    stage: int
    tensors: int
    parameters: int
    differences: list[str]


def dry_run(model: ModelConfig, layout: Layout) -> Iterator[Built]:
    """Builds the part of a rank of every stage in turn; the ranks of a stage hold parts of the same shapes."""
    for stage in range(layout.pipeline):
        found, planned = built_shapes(model, layout, stage), stage_shapes(model, layout, stage)
        differences = [f"{name} is planned but not built" for name in planned if name not in found]
        differences += [f"{name} is built but not planned" for name in found if name not in planned]
        differences += [
            f"{name} is {shape}, planned {planned[name]}"
            for name, shape in found.items()
            if planned.get(name, shape) != shape
        ]
        count = sum(math.prod(shape) for shape in found.values())
        if not differences and count != held_by_stage(model, layout, stage).total:
            differences.append(f"{count} parameters, planned {held_by_stage(model, layout, stage).total}")
        yield Built(stage, len(found), count, differences)


def built_shapes(model: ModelConfig, layout: Layout, stage: int) -> dict[str, tuple[int, ...]]:
    """Global name -> shape of what a rank of ``stage`` builds."""
    with paddle.LazyGuard():
        parts = dict(_parts(model, layout, stage))
    return {
        f"{home}.{name}" if name else home: tuple(parameter.shape)
        for home, part in parts.items()
        for name, parameter in part.named_parameters()
    }


def _parts(model: ModelConfig, layout: Layout, stage: int) -> Iterator[tuple[str, nn.Layer]]:
    """Where a layer stands in the model, and the layer with this rank's sizes."""
    config = _rank_config(model, layout)
    last, top = stage == layout.pipeline - 1, model.num_layers - model.audio_levels
    blocks = [i for chunk in layout.stage_chunks(stage, model.num_layers) for i in chunk]
    if stage == 0:
        yield "embedding", Embedding(config)
    for i in blocks:
        yield f"layers.{i}", _block(model, layout, Block(config))
        if i >= top:
            yield f"audio_heads.{i - top}", AudioHead(config)
    if stage > 0 and any(top <= i < model.num_layers - 1 for i in blocks):  # codes are fed back behind these
        yield "embedding.audio", AudioEmbedding(config)
    if not last:
        return
    if stage > 0:
        yield "embedding.tokens", nn.Embedding(config.vocab_size, config.hidden_size)
    yield "norm", RMSNorm(config.hidden_size, config.norm_eps)
    yield "bit_head", BitHead(config)
    if model.mtp_depth:
        mtp = MultiTokenPrediction(config)
        _block(model, layout, mtp.block)
        yield "mtp", mtp


def _rank_config(model: ModelConfig, layout: Layout) -> Ernie5Config:
    """Heads, vocabulary and width of the shared expert of one tensor rank."""
    parts = ("num_heads", "num_kv_heads", "vocab_size", "shared_expert_intermediate_size")
    local = {name: getattr(model, name) // layout.tensor for name in parts}
    return Ernie5Config.from_model_config(dataclasses.replace(model, **local))


def _block(model: ModelConfig, layout: Layout, block: Block) -> Block:
    """The block with the routed experts of one rank; its router still knows all."""
    fewer = dataclasses.replace(model, num_experts=local_experts(model, layout))
    block.moe.experts = Experts(Ernie5Config.from_model_config(fewer))
    return block
