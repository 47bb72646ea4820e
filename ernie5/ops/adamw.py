"""``adamw``: the AdamW step of many tensors at once (arXiv 1711.05101), and the norm that clipping needs.

The meaning is that of ``paddle.optimizer.AdamW``; everything happens in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import paddle

from ernie5.ops import kernels


@dataclass
class AdamWTensors:
    """What a step changes and reads, one entry a parameter: float32, but for gradients and copies.

    ``first_powers`` and ``second_powers`` [1] hold beta1^step and beta2^step of the step to come, on the CPU.
    ``copies``, if any, are bfloat16 tensors that receive the new parameters.
    """

    parameters: list[paddle.Tensor] = field(default_factory=list)
    gradients: list[paddle.Tensor] = field(default_factory=list)  # all float32 or all bfloat16
    first: list[paddle.Tensor] = field(default_factory=list)
    second: list[paddle.Tensor] = field(default_factory=list)
    first_powers: list[paddle.Tensor] = field(default_factory=list)
    second_powers: list[paddle.Tensor] = field(default_factory=list)
    copies: list[paddle.Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # the parameter's own learning rate
    decays: list[float] = field(default_factory=list)  # its decoupled weight decay


@paddle.no_grad()
def adamw_step(tensors: AdamWTensors, betas: tuple[float, float], epsilon: float, gradient_factor: float = 1.0) -> None:
    """One step with gradients that count ``gradient_factor`` times; the powers move on to the next step."""
    if not tensors.parameters:
        return
    if kernels.available("adamw") and tensors.parameters[0].place.is_cpu_place():
        t = tensors
        state = [t.parameters, t.gradients, t.first, t.second, t.first_powers, t.second_powers, t.copies or None]
        kernels.call("adamw", state, [t.rates, t.decays, *betas, epsilon, gradient_factor])
        for changed in (*t.parameters, *t.copies):  # the kernel writes behind Paddle's back
            changed._bump_inplace_version()
    else:
        _reference(tensors, betas, epsilon, gradient_factor)


@paddle.no_grad()
def global_norm(gradients: Sequence[paddle.Tensor]) -> float:
    """The 2-norm of all gradients together; infinite or NaN where one of them is."""
    total = 0.0
    for dtype in (paddle.float32, paddle.bfloat16, paddle.float64):
        values = [gradient for gradient in gradients if gradient.dtype == dtype]
        if (
            values
            and dtype != paddle.float64
            and kernels.available("sum_of_squares")
            and values[0].place.is_cpu_place()
        ):
            total += float(kernels.call("sum_of_squares", [values]))
        elif values:
            wide = "float64" if dtype == paddle.float64 else "float32"
            total += float(paddle.add_n([(value.astype(wide) ** 2).sum() for value in values]))
    return total**0.5


def _reference(tensors: AdamWTensors, betas: tuple[float, float], epsilon: float, gradient_factor: float) -> None:
    t = tensors
    for i, parameter in enumerate(t.parameters):
        gradient = t.gradients[i].astype("float32") * gradient_factor
        first = t.first[i] * betas[0] + gradient * (1 - betas[0])
        second = t.second[i] * betas[1] + gradient * gradient * (1 - betas[1])
        corrected = paddle.sqrt(second) / (1 - t.second_powers[i]).sqrt() + epsilon
        moved = parameter * (1 - t.rates[i] * t.decays[i])
        moved = moved - t.rates[i] / (1 - t.first_powers[i]) * first / corrected
        for tensor, value in (
            (parameter, moved),
            (t.first[i], first),
            (t.second[i], second),
            (t.first_powers[i], t.first_powers[i] * betas[0]),
            (t.second_powers[i], t.second_powers[i] * betas[1]),
        ):
            paddle.assign(value, output=tensor)
        if t.copies:
            paddle.assign(moved.astype(t.copies[i].dtype), output=t.copies[i])
