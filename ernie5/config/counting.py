"""What a model costs, from its configuration alone: the shape of every parameter, counts, floating-point operations.

The shapes are those of ``ernie5.model``; tests hold them against built models.
``D`` hidden, ``H``/``G`` heads, ``h`` head_dim, ``E`` experts, ``k`` per token, ``F``/``Fs`` expert widths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ernie5.config.schema import ModelConfig

Shapes = dict[str, tuple[int, ...]]

LARGEST_PATCHES = 16  # of one understanding token: rows of the patch merger's slots
_PARTS = {  # beginning of a parameter's name, without its block -> part of the network; the first that fits
    "attention.": "attention",
    "attention_norm.": "block_norms",
    "moe_norm.": "block_norms",
    "moe.router.": "router",
    "moe.experts.": "experts",
    "moe.shared.": "shared_expert",
    "embedding.tokens.": "text_embedding",
    "embedding.vision.": "vision_embedding",
    "embedding.patches.": "patch_merger",
    "embedding.audio.": "audio_embedding",
    "embedding.speaker.": "speaker_embedding",
    "norm.": "final_norm",
    "bit_head.": "bit_head",
    "audio_heads.": "audio_heads",
    "mtp.": "mtp",
}


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of trainable parameters. ``active``: those one token's forward pass may touch.

    ``active`` leaves out only the routed experts a token does not choose; tables and heads of every modality count in
    full. Router correction biases and loss averages are state, not parameters.
    """

    total: int
    active: int
    expert_total: int  # routed experts of every layer, the multi-token-prediction block included
    expert_active: int
    parts: dict[str, int]  # by part of the network; sums to total

    @property
    def active_fraction(self) -> float:
        """Share of all parameters that one token uses."""
        return self.active / self.total

    @property
    def expert_active_fraction(self) -> float:
        """Share of routed-expert parameters that one token uses: k / E."""
        return self.expert_active / self.expert_total


def num_params(model: ModelConfig) -> ParameterCount:
    """Counts of the model that ``Ernie5ForCausalLM`` builds from this configuration."""
    blocks = model.num_layers + model.mtp_depth
    expert = 3 * model.hidden_size * model.expert_intermediate_size
    parts = dict.fromkeys(_PARTS.values(), 0)
    for name, shape in block_shapes(model).items():
        parts[_part(name)] += blocks * math.prod(shape)
    for name, shape in outer_shapes(model).items():
        parts[_part(name)] += math.prod(shape)
    total, expert_total = sum(parts.values()), parts["experts"]
    expert_active = blocks * model.experts_per_token * expert
    return ParameterCount(total, total - expert_total + expert_active, expert_total, expert_active, parts)


def _part(name: str) -> str:
    return next(part for beginning, part in _PARTS.items() if name.startswith(beginning))


def parameter_shapes(model: ModelConfig) -> Shapes:
    """Global name -> shape of every parameter of the built model."""
    shapes = dict(outer_shapes(model))
    homes = [f"layers.{i}." for i in range(model.num_layers)] + ["mtp.block."] * model.mtp_depth
    for home in homes:
        shapes |= {home + name: shape for name, shape in block_shapes(model).items()}
    return shapes


def block_shapes(model: ModelConfig) -> Shapes:
    """Name within a block -> shape; the multi-token-prediction block is one more of the same."""
    d, heads, groups = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    experts, width, shared = model.num_experts, model.expert_intermediate_size, model.shared_expert_intermediate_size
    shapes = {
        "attention_norm.weight": (d,),
        "attention.q_proj.weight": (d, heads),
        "attention.k_proj.weight": (d, groups),
        "attention.v_proj.weight": (d, groups),
        "attention.o_proj.weight": (heads, d),
        "moe_norm.weight": (d,),
        "moe.router.weight": (d, experts),
        "moe.experts.gate_up": (experts, d, 2 * width),
        "moe.experts.down": (experts, width, d),
    }
    if shared:
        shapes |= {"moe.shared.gate_up": (d, 2 * shared), "moe.shared.down": (shared, d)}
    return shapes


def outer_shapes(model: ModelConfig) -> Shapes:
    """Name -> shape of what lies outside the blocks; the text head is tied to the text embedding."""
    d, bits, levels = model.hidden_size, model.vision_bits, model.audio_levels
    shapes = {
        "embedding.tokens.weight": (model.vocab_size, d),
        "embedding.vision.weight": (bits, d),
        "embedding.vision.bias": (d,),
        "embedding.vision.scales": (model.vision_num_scales + 1, d),
        **_merger_shapes(model),
        "embedding.audio.weight": (levels * model.audio_codebook_size, d),
        "embedding.speaker.weight": (model.speaker_dim, d),
        "embedding.speaker.bias": (d,),
        "norm.weight": (d,),
        "bit_head.weight": (d, 2 * bits),
        "bit_head.bias": (2 * bits,),
    }
    for level in range(levels):
        shapes[f"audio_heads.{level}.norm.weight"] = (d,)
        shapes[f"audio_heads.{level}.weight"] = (d, model.audio_codebook_size + 1)
    if model.mtp_depth:
        shapes |= {f"mtp.{norm}.weight": (d,) for norm in ("norm_hidden", "norm_embed", "norm")}
        shapes["mtp.proj.weight"] = (2 * d, d)
    return shapes


def _merger_shapes(model: ModelConfig) -> Shapes:
    d, cnn, vit = model.hidden_size, model.vision_cnn_dim, model.vision_vit_dim
    linear = {"cnn": (cnn, vit), "qkv": (vit, 3 * vit), "out": (vit, vit), "proj": (vit, d)}
    shapes: Shapes = {"slots": (LARGEST_PATCHES, vit)}
    for name, size in (("norm_cnn", cnn), ("norm_vit", vit)):
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[1:]}
    return {f"embedding.patches.{name}": shape for name, shape in shapes.items()}


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Multiply-adds x 2 of one text token's forward pass at full context; training takes three times that.

    Attention counts the average causal row, (sequence_length + 1) / 2 keys. A multi-token-prediction block counts as
    one more layer plus its projection and a second pass of the text head. Norms, softmax and look-ups are left out.
    """
    blocks = model.num_layers + model.mtp_depth
    return blocks * block_flops(model, sequence_length) + head_flops(model)


def block_flops(model: ModelConfig, sequence_length: int) -> int:
    """The part of ``flops_per_token`` of one block."""
    sizes = {name: math.prod(shape) for name, shape in block_shapes(model).items() if "norm" not in name}
    active = sum(size for name, size in sizes.items() if "experts" not in name)
    return 2 * active + score_flops(model, sequence_length) + expert_flops(model)


def score_flops(model: ModelConfig, sequence_length: int) -> int:
    """The part of ``block_flops`` of attention itself: q.k and p.v over half the context."""
    return 2 * model.num_heads * model.head_dim * (sequence_length + 1)


def expert_flops(model: ModelConfig) -> int:
    """The part of ``block_flops`` of the routed experts."""
    return 2 * model.experts_per_token * 3 * model.hidden_size * model.expert_intermediate_size


def head_flops(model: ModelConfig) -> int:
    """The part of ``flops_per_token`` outside the blocks: the text head, once more for multi-token prediction."""
    d = model.hidden_size
    return 2 * ((1 + model.mtp_depth) * model.vocab_size * d + model.mtp_depth * 2 * d * d)
