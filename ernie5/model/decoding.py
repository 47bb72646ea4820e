"""The weights of a model as the decoding kernel takes them, and the caches that go with it."""

from __future__ import annotations

from typing import Any

import paddle

from ernie5.model.layers import Block, LayerCache
from ernie5.ops.decode import DecodeCache, DecodeStep, DecodeWeights, available
from ernie5.ops.rope import band_frequencies


def new_cache(model: Any) -> DecodeCache | list[LayerCache]:
    """An empty cache for one batch of sequences, bound to the kernel where that serves the model."""
    weights = decode_weights(model)
    if not available(weights):
        return [LayerCache() for _ in model.layers]
    step = DecodeStep(weights)
    return DecodeCache(step.layers, step.groups, step.head_dim, step)


def decode_weights(model: Any) -> DecodeWeights:
    """The weights of an ``Ernie5ForCausalLM``; tensors are the model's own."""
    config = model.config
    return DecodeWeights(
        layers=[_layer_weights(block) for block in model.layers],
        embedding=model.embedding.tokens.weight,
        final_norm=model.norm.weight,
        frequencies=band_frequencies(config.head_dim, config.rope_base, config.rope_pattern),
        heads=config.num_heads,
        groups=config.num_kv_heads,
        top_k=config.experts_per_token,
        softmax=config.router_activation == "softmax",
        scale=config.routed_scaling_factor,
        eps=config.norm_eps,
    )


def _layer_weights(block: Block) -> dict[str, paddle.Tensor]:
    attention, moe = block.attention, block.moe
    weights = {
        "attention_norm": block.attention_norm.weight,
        "query": attention.q_proj.weight,
        "key": attention.k_proj.weight,
        "value": attention.v_proj.weight,
        "out": attention.o_proj.weight,
        "moe_norm": block.moe_norm.weight,
        "router": moe.router.weight,
        "bias": moe.router.correction_bias,
        "gate_up": moe.experts.gate_up,
        "down": moe.experts.down,
    }
    if moe.shared is not None:
        weights |= {"shared_gate_up": moe.shared.gate_up, "shared_down": moe.shared.down}
    return weights
