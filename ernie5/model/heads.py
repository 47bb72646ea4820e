"""Heads of the four kinds: text (tied), bits, codec levels, and the multi-token-prediction block.

Shapes: N rows that carry a label, D hidden, V vocabulary, d bits, C codebook size.
"""

from __future__ import annotations

import paddle
from paddle import nn

from ernie5.model.configuration import Ernie5Config
from ernie5.model.layers import Block, Linear, RMSNorm
from ernie5.model.losses import token_loss
from ernie5.ops.attention import IntervalMask
from ernie5.ops.linear import linear
from ernie5.ops.rope import RopeTables


class BitHead(nn.Layer):
    """d independent two-way classifiers, the "infinite-vocabulary classifier" of Infinity (arXiv 2412.04431)."""

    def __init__(self, config: Ernie5Config) -> None:
        super().__init__()
        self.bits = config.vision_bits
        self.weight = self.create_parameter([config.hidden_size, 2 * self.bits])
        self.bias = self.create_parameter([2 * self.bits], is_bias=True)

    def forward(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """[..., D] -> logits [..., d, 2]."""
        logits = linear(hidden, self.weight).astype(_at_least_float32(self.bias.dtype))
        return (logits + self.bias.astype(logits.dtype)).reshape([*hidden.shape[:-1], self.bits, 2])


class AudioHead(nn.Layer):
    """One codec level: its own norm, then C codes and the end of audio (DnD-Transformer, arXiv 2410.01912)."""

    def __init__(self, config: Ernie5Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.weight = self.create_parameter([config.hidden_size, config.audio_codebook_size + 1])

    def forward(self, hidden: paddle.Tensor) -> paddle.Tensor:
        return linear(self.norm(hidden), self.weight)


class MultiTokenPrediction(nn.Layer):
    """Depth-1 MTP: state of position i and embedding of token i+1 through one more block predict token i+2.

    Form of DeepSeek-V3 (arXiv 2412.19437 §2.2), embedding and output head shared with the backbone.
    """

    def __init__(self, config: Ernie5Config) -> None:
        super().__init__()
        self.norm_hidden = RMSNorm(config.hidden_size, config.norm_eps)
        self.norm_embed = RMSNorm(config.hidden_size, config.norm_eps)
        self.proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = Block(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        hidden: paddle.Tensor,
        next_embedding: paddle.Tensor,
        rope: RopeTables,
        mask: IntervalMask,
        valid: paddle.Tensor,
        cache: object | None = None,
    ) -> paddle.Tensor:
        """hidden and next_embedding [B,S,D] -> [B,S,D], ready for the text head."""
        wide = _at_least_float32(hidden.dtype)
        parts = [self.norm_hidden(hidden).astype(wide), self.norm_embed(next_embedding).astype(wide)]
        joined = paddle.concat(parts, axis=-1).astype(hidden.dtype)
        return self.norm(self.block(self.proj(joined), rope, mask, valid, cache))


class TextLosses(nn.Layer):
    """The tied text head and its losses: normed states [N,D] and labels [N] -> losses [N], in nats."""

    collective = False  # whether it must be called even where there is no row

    def forward(self, states: paddle.Tensor, labels: paddle.Tensor, embedding: paddle.Tensor) -> paddle.Tensor:
        return token_loss(text_logits(states, embedding), labels)


def text_logits(hidden: paddle.Tensor, embedding: paddle.Tensor) -> paddle.Tensor:
    """[..., D] x tied embedding [V,D] -> [..., V]."""
    return linear(hidden, embedding, transposed=True)


def _at_least_float32(dtype: paddle.dtype) -> paddle.dtype:
    """float32 for bfloat16, in which Paddle's CPU kernels neither join nor add with broadcasting."""
    return paddle.float32 if dtype == paddle.bfloat16 else dtype
