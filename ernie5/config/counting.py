"""What a model costs, from its configuration alone: parameters (all, and per token) and floating-point operations.

Closed forms over the shapes of ``ernie5.model``; tests hold them against built models.
``D`` hidden, ``H``/``G`` heads, ``h`` head_dim, ``E`` experts, ``k`` per token, ``F``/``Fs`` expert widths.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie5.config.schema import ModelConfig


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
    parts = {name: blocks * size for name, size in _block_parts(model).items()} | _outer_parts(model)
    total, expert_total = sum(parts.values()), parts["experts"]
    expert_active = blocks * model.experts_per_token * expert
    return ParameterCount(total, total - expert_total + expert_active, expert_total, expert_active, parts)


def _block_parts(model: ModelConfig) -> dict[str, int]:
    """Parameters of one block by part."""
    d, width = model.hidden_size, model.head_dim
    return {
        "attention": 2 * d * width * (model.num_heads + model.num_kv_heads),
        "block_norms": 2 * d,
        "router": d * model.num_experts,
        "experts": model.num_experts * 3 * d * model.expert_intermediate_size,
        "shared_expert": 3 * d * model.shared_expert_intermediate_size,
    }


def _outer_parts(model: ModelConfig) -> dict[str, int]:
    """Parameters outside the blocks by part; the text head is tied to the text embedding."""
    d, cnn, vit = model.hidden_size, model.vision_cnn_dim, model.vision_vit_dim
    merger = 2 * (cnn + vit) + (cnn + 1) * vit + (vit + 1) * 3 * vit + (vit + 1) * vit + (vit + 1) * d + 16 * vit
    return {
        "text_embedding": model.vocab_size * d,
        "vision_embedding": (model.vision_bits + 1) * d + (model.vision_num_scales + 1) * d,
        "patch_merger": merger,
        "audio_embedding": model.audio_levels * model.audio_codebook_size * d,
        "speaker_embedding": (model.speaker_dim + 1) * d,
        "final_norm": d,
        "bit_head": (d + 1) * 2 * model.vision_bits,
        "audio_heads": model.audio_levels * (d + d * (model.audio_codebook_size + 1)),
        "mtp": model.mtp_depth * (3 * d + 2 * d * d),
    }


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Multiply-adds x 2 of one text token's forward pass at full context; training takes three times that.

    Attention counts the average causal row, (sequence_length + 1) / 2 keys. A multi-token-prediction block counts as
    one more layer plus its projection and a second pass of the text head. Norms, softmax and look-ups are left out.
    """
    d, blocks = model.hidden_size, model.num_layers + model.mtp_depth
    part = _block_parts(model)
    expert = 3 * d * model.expert_intermediate_size
    block = part["attention"] + part["router"] + part["shared_expert"] + model.experts_per_token * expert
    scores = model.num_heads * model.head_dim * (sequence_length + 1)  # q.k and p.v over half the context
    heads = (1 + model.mtp_depth) * model.vocab_size * d + model.mtp_depth * 2 * d * d
    return 2 * (blocks * (block + scores) + heads)
