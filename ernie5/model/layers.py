"""RMSNorm, attention, mixture of experts, and the block made of them.

Shapes: B batch, S positions of this call, M positions so far (cache included), D hidden, T = B*S tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import nn

from ernie5.model.configuration import Ernie5Config
from ernie5.ops.attention import IntervalMask, flashmask_attention
from ernie5.ops.elementwise import add, fork
from ernie5.ops.experts import dense_ffn, moe_ffn
from ernie5.ops.linear import linear
from ernie5.ops.norm import add_rms_norm, rms_norm
from ernie5.ops.recompute import recompute
from ernie5.ops.rope import RopeTables, uni_rope
from ernie5.ops.route import Routing, permutation, route


class RMSNorm(nn.Layer):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = self.create_parameter([dim], default_initializer=nn.initializer.Constant(1.0))
        self.eps = eps

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: paddle.Tensor, residual: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """(norm(x + residual), x + residual)."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class Linear(nn.Layer):
    """x [..., D] -> x weight [..., O], without a bias."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = self.create_parameter([inner, outer])

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return linear(x, self.weight)


class LayerCache:
    """Keys and values [B,M,G,h] of one layer, growing with every call that carries the cache."""

    def __init__(self) -> None:
        self.k: paddle.Tensor | None = None
        self.v: paddle.Tensor | None = None

    def append(self, k: paddle.Tensor, v: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        self.k = k if self.k is None else paddle.concat([self.k, k], axis=1)
        self.v = v if self.v is None else paddle.concat([self.v, v], axis=1)
        return self.k, self.v


class Attention(nn.Layer):
    """Grouped-query attention with Uni-RoPE under an interval mask.

    The projections say how many heads there are, and the rotary tables how many rows: the tokens may come as [B,S,D],
    or flat as [N,D] where the projections turn N rows into the B*S of the tables.
    """

    def __init__(self, config: Ernie5Config) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(hidden, config.num_heads * self.head_dim)
        self.k_proj = Linear(hidden, config.num_kv_heads * self.head_dim)
        self.v_proj = Linear(hidden, config.num_kv_heads * self.head_dim)
        self.o_proj = Linear(config.num_heads * self.head_dim, hidden)

    def forward(
        self,
        x: paddle.Tensor,
        rope: RopeTables,
        mask: IntervalMask,
        cache: LayerCache | None = None,
    ) -> paddle.Tensor:
        batch, length, _ = rope.cos.shape
        read = fork(x, 3)
        q, k, v = self.q_proj(read[0]), self.k_proj(read[1]), self.v_proj(read[2])
        if x.ndim == 2:
            q, k = q.reshape([batch, length, -1]), k.reshape([batch, length, -1])
        q, k = uni_rope(q, k, rope)
        q, k, v = (part.reshape([batch, length, -1, self.head_dim]) for part in (q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)
        out = flashmask_attention(q, k, v, mask)
        return self.o_proj(out.reshape([batch, length, -1] if x.ndim == 3 else [batch * length, -1]))


class Router(nn.Layer):
    """fp32 gate on the token state alone. ``correction_bias`` [E] moves the selection, never the weights (report §2.1).

    In training it counts the tokens of every expert in ``counts`` for the bias update; a recomputed forward, padding
    and evaluation never count.
    """

    def __init__(self, config: Ernie5Config) -> None:
        super().__init__()
        self.weight = self.create_parameter([config.hidden_size, config.num_experts])
        self.register_buffer("correction_bias", paddle.zeros([config.num_experts], dtype=self.weight.dtype))
        self.counts = paddle.zeros([config.num_experts], dtype="int64")
        self.top_k = config.experts_per_token
        self.activation = config.router_activation
        self.scale = config.routed_scaling_factor
        self.recomputing = False

    def forward(self, x: paddle.Tensor, valid: paddle.Tensor) -> Routing:
        """x [T,D], valid bool [T], False on padding."""
        routing = route(x, self.weight, self.correction_bias, valid, self.top_k, self.activation, self.scale)
        if self.training and not self.recomputing:
            self.counts = self.counts + routing.counts
        return routing

    @paddle.no_grad()
    def update_bias(self, speed: float) -> None:
        """b += speed * sign(mean load - load), then forgets the counts (Wang et al., arXiv 2408.15664)."""
        load = self.counts.astype(self.correction_bias.dtype)
        self.correction_bias.set_value(self.correction_bias + speed * paddle.sign(load.mean() - load))
        self.counts = paddle.zeros_like(self.counts)


class Experts(nn.Layer):
    """All routed experts, stacked: ``gate_up`` [E,D,2F] (gate first), ``down`` [E,F,D]."""

    def __init__(self, config: Ernie5Config) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.expert_intermediate_size
        self.gate_up = self.create_parameter([experts, hidden, 2 * width])
        self.down = self.create_parameter([experts, width, hidden])
        self.sub_batch = config.moe_sub_batch

    def forward(
        self, x: paddle.Tensor, routing: Routing, shared: Callable[[paddle.Tensor], paddle.Tensor] | None = None
    ) -> paddle.Tensor:
        """x [T,D] -> [T,D], ``shared`` of every token included.

        In training, at most ``sub_batch`` tokens (0: all) keep activations at a time.
        """
        if shared is None:
            return self.routed(x, routing)
        x, again = fork(x, 2)
        return add(self.routed(x, routing), shared(again), alone=True)

    def routed(self, x: paddle.Tensor, routing: Routing) -> paddle.Tensor:
        if not (self.training and 0 < self.sub_batch < x.shape[0]):
            return moe_ffn(x, routing.weights, routing.order, routing.offsets, self.gate_up, self.down)
        size, parts = self.sub_batch, []
        for start in range(0, x.shape[0], size):
            rows = slice(start, start + size)
            parts.append(recompute(self._part, x[rows], routing.weights[rows], routing.experts[rows]))
        return paddle.concat(parts)

    def _part(self, x: paddle.Tensor, weights: paddle.Tensor, experts: paddle.Tensor) -> paddle.Tensor:
        _, order, offsets = permutation(experts, self.gate_up.shape[0])
        return moe_ffn(x, weights, order, offsets, self.gate_up, self.down)


class SharedExpert(nn.Layer):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = self.create_parameter([hidden, 2 * width])
        self.down = self.create_parameter([width, hidden])

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return dense_ffn(x, self.gate_up, self.down)


class MoE(nn.Layer):
    """Router, routed experts and the optional shared expert; padding passes through none of the routed ones."""

    def __init__(self, config: Ernie5Config) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        width = config.shared_expert_intermediate_size
        self.shared = SharedExpert(config.hidden_size, width) if width else None

    def forward(self, x: paddle.Tensor, valid: paddle.Tensor) -> paddle.Tensor:
        tokens, seen = fork(x.reshape([-1, x.shape[-1]]), 2)
        return self.experts(tokens, self.router(seen, valid.flatten()), self.shared).reshape(x.shape)


class Block(nn.Layer):
    """x + Attention(norm(x)), then + MoE(norm(x)); every block is MoE (report §6.4.1)."""

    def __init__(self, config: Ernie5Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.moe_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.moe = MoE(config)

    def forward(
        self,
        x: paddle.Tensor,
        rope: RopeTables,
        mask: IntervalMask,
        valid: paddle.Tensor,
        cache: LayerCache | None = None,
    ) -> paddle.Tensor:
        read, x = fork(x, 2)
        normed, x = self.moe_norm.add(self.attention(self.attention_norm(read), rope, mask, cache), x)
        return add(x, self.moe(normed, valid), alone=True)


@paddle.no_grad()
def to_bfloat16(layer: nn.Layer, except_for: tuple[str, ...] = ()) -> None:
    """New bfloat16 parameters in place of the layer's own, but for routers and sublayers whose name begins so."""
    for path, part in layer.named_sublayers(include_self=True):
        if isinstance(part, Router) or (except_for and path.startswith(except_for)):
            continue
        for key, parameter in list(part._parameters.items()):
            if parameter is not None:
                name, zeros = f"{parameter.name}.bfloat16", nn.initializer.Constant(0.0)
                half = paddle.create_parameter(parameter.shape, "bfloat16", name, default_initializer=zeros)
                half.set_value(parameter.astype("bfloat16"))
                half.stop_gradient, half.is_distributed = parameter.stop_gradient, parameter.is_distributed
                part._parameters[key] = half
