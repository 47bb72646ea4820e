"""Expert selection: scores on the token state, top-k by score + bias, combine weights from the unbiased scores.

Shapes: T tokens, D hidden, E experts, K experts per token. Follows the ERNIE 5.0 report §2.1 (aux-loss-free balance).
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
import paddle.nn.functional as F

from ernie5.ops import kernels
from ernie5.ops.elementwise import cast
from ernie5.ops.linear import linear


@dataclass
class Routing:
    experts: paddle.Tensor  # int32 [T,K]; -1 where the token is not routed (padding)
    weights: paddle.Tensor  # [T,K] combine weights, 0 where not routed
    counts: paddle.Tensor  # int64 [E], routed tokens of each expert
    order: paddle.Tensor  # int32 [T*K], assignments t*K+k grouped by expert, -1 behind the last routed one
    offsets: paddle.Tensor  # int32 [E+1], where each expert's assignments begin in ``order``


def route(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor,
    valid: paddle.Tensor,
    top_k: int,
    activation: str = "sigmoid",
    scale: float = 1.0,
) -> Routing:
    """Routes x [T,D] with ``weight`` [D,E]; ``bias`` [E] shifts the selection only; ``valid`` bool [T], False = pad.

    Scores are computed in fp32 (or float64 where the inputs are). The K weights of a token sum to ``scale``. Of equal
    scores the lower expert is taken.
    """
    logits = linear(cast(x, weight.dtype), weight)
    if kernels.serves("route", logits):
        softmax = activation == "softmax"
        return Routing(*kernels.call("route", [logits, bias, valid], [top_k, softmax, scale]))
    return _reference(logits, bias, valid, top_k, activation, scale)


def permutation(experts: paddle.Tensor, num_experts: int) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """(counts, order, offsets) of experts int32 [T,K], -1 = not routed; see ``Routing``."""
    if paddle.in_dynamic_mode() and kernels.reaches("permute", experts):
        counts, order, offsets = kernels.call("permute", [experts], [num_experts])
        return counts, order, offsets
    flat = experts.flatten().astype("int64")
    flat = paddle.where(flat < 0, paddle.full_like(flat, num_experts), flat)
    order = paddle.argsort(flat, stable=True)
    order = paddle.where(flat.gather(order) < num_experts, order, paddle.full_like(order, -1))
    counts = paddle.bincount(flat, minlength=num_experts + 1)[:num_experts]
    offsets = F.pad(paddle.cumsum(counts), [1, 0], value=0)
    return counts, order.astype("int32"), offsets.astype("int32")


def _reference(
    logits: paddle.Tensor, bias: paddle.Tensor, valid: paddle.Tensor, top_k: int, activation: str, scale: float
) -> Routing:
    scores = F.sigmoid(logits) if activation == "sigmoid" else F.softmax(logits, axis=-1)
    experts = paddle.argsort(scores.detach() + bias, axis=-1, descending=True, stable=True)[:, :top_k]
    chosen = paddle.take_along_axis(scores, experts, axis=-1)
    weights = chosen * (scale / paddle.clip(chosen.sum(-1, keepdim=True), min=1e-12))
    routed = valid.unsqueeze(-1)
    weights = weights * routed.astype(weights.dtype)
    experts = paddle.where(routed, experts, paddle.full([], -1, dtype=experts.dtype)).astype("int32")
    return Routing(experts, weights, *permutation(experts, logits.shape[1]))
