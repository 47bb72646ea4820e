"""Expert selection: scores on the token state, top-k by score + bias, combine weights from the unbiased scores.

Shapes: T tokens, D hidden, E experts, K experts per token. Follows the ERNIE 5.0 report §2.1 (aux-loss-free balance).
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
import paddle.nn.functional as F


@dataclass
class Routing:
    experts: paddle.Tensor  # int64 [T,K]; -1 where the token is not routed (padding)
    weights: paddle.Tensor  # [T,K] combine weights, 0 where not routed
    counts: paddle.Tensor  # int64 [E], routed tokens of each expert


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

    Scores are computed in fp32 (or float64 where the inputs are). The K weights of a token sum to ``scale``.
    """
    logits = paddle.matmul(x.astype(weight.dtype), weight)
    scores = F.sigmoid(logits) if activation == "sigmoid" else F.softmax(logits, axis=-1)
    experts = paddle.topk(scores.detach() + bias, top_k, axis=-1)[1]
    chosen = paddle.take_along_axis(scores, experts, axis=-1)
    weights = chosen * (scale / paddle.clip(chosen.sum(-1, keepdim=True), min=1e-12))
    routed = valid.unsqueeze(-1)
    weights = weights * routed.astype(weights.dtype)
    experts = paddle.where(routed, experts, paddle.full([], -1, dtype=experts.dtype))
    num_experts = weight.shape[1]
    counts = paddle.bincount(experts.flatten() + 1, minlength=num_experts + 1)[1:]
    return Routing(experts, weights, counts)
