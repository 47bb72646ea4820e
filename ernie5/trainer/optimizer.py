"""AdamW with decoupled weight decay on matrices only, and clipping by global norm that also guards the update."""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import nn

from ernie5.ops.adamw import global_norm
from ernie5.trainer.fused_adamw import FusedAdamW

# Tables whose rows are looked up: a row that no position used has no gradient, and decay would only wear it away.
LOOKED_UP = ("embedding.tokens.weight", "embedding.audio.weight", "embedding.vision.scales", "embedding.patches.slots")


def decays(name: str, parameter: paddle.Tensor) -> bool:
    """True for matrices and stacked experts; False for norms, biases and embedding tables."""
    return len(parameter.shape) >= 2 and not name.endswith((*LOOKED_UP, "bias")) and "norm" not in name


class GuardedClip(nn.ClipGradByGlobalNorm):
    """Measures the global norm before every update and scales to ``clip_norm`` where it is larger (<= 0: never).

    ``norm`` keeps the last norm; if it is not finite, ``refuse(norm)`` is called before any parameter changes and must
    raise. ``FusedAdamW`` takes the factor alone; called as a clip, it scales the gradients in place. ``measure`` gives
    the norm of (parameter, gradient) pairs where these are not all there are.
    """

    def __init__(self, clip_norm: float, refuse: Callable[[float], None]) -> None:
        super().__init__(clip_norm)
        self.refuse = refuse
        self.norm = 0.0
        self.measure: Callable[[list[tuple[paddle.Tensor, paddle.Tensor]]], float] = _norm

    def clip_factor(self, params_grads: list[tuple[paddle.Tensor, paddle.Tensor]]) -> float:
        """What every gradient is to be multiplied by; 1 below ``clip_norm``."""
        self.norm = self.measure(params_grads)
        if not 0.0 <= self.norm < float("inf"):
            self.refuse(self.norm)
        return self.clip_norm / self.norm if 0 < self.clip_norm < self.norm else 1.0

    @paddle.no_grad()
    def _dygraph_clip(self, params_grads: list[tuple[paddle.Tensor, paddle.Tensor]]) -> list:
        clipped = [(p, g) for p, g in params_grads if g is not None and getattr(p, "need_clip", True)]
        factor = self.clip_factor(clipped)
        if factor != 1.0:
            for _, grad in clipped:
                grad.scale_(factor)
        return params_grads


def _norm(params_grads: list[tuple[paddle.Tensor, paddle.Tensor]]) -> float:
    return global_norm([grad for _, grad in params_grads])


def build_optimizer(
    model: nn.Layer,
    learning_rate: paddle.optimizer.lr.LRScheduler,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    clip: GuardedClip,
) -> paddle.optimizer.AdamW:
    """For all that trains; bfloat16 parameters get float32 masters."""
    trainable = [(name, p) for name, p in model.named_parameters() if not p.stop_gradient]
    decayed = {p.name for name, p in trainable if decays(name, p)}
    return FusedAdamW(
        learning_rate=learning_rate,
        beta1=betas[0],
        beta2=betas[1],
        epsilon=epsilon,
        parameters=[p for _, p in trainable],
        weight_decay=weight_decay,
        apply_decay_param_fun=decayed.__contains__,
        grad_clip=clip,
        multi_precision=any(p.dtype == paddle.bfloat16 for _, p in trainable),
    )
