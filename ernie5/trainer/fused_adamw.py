"""``FusedAdamW``: ``paddle.optimizer.AdamW`` whose step is one kernel over all parameters, clipping included."""

from __future__ import annotations

import paddle

from ernie5.ops import kernels
from ernie5.ops.adamw import AdamWTensors, adamw_step, global_norm

Pairs = list[tuple[paddle.Tensor, paddle.Tensor]]


class FusedAdamW(paddle.optimizer.AdamW):
    """Same arguments, accumulators, ``state_dict`` and meaning; what the kernel does not do runs Paddle's own step.

    Served: dense float32 parameters (or bfloat16 ones with ``multi_precision``) on the CPU, in one group. A clip with
    a method ``clip_factor(params_grads)`` gives one factor for all gradients and leaves them unscaled;
    ``ClipGradByGlobalNorm`` is measured here. Any other clip is called as usual.
    """

    def _apply_optimize(
        self, loss: object, startup_program: object, params_grads: Pairs | dict, param_group_idx: int = 0
    ) -> object:
        if not self._served(params_grads):
            return super()._apply_optimize(loss, startup_program, params_grads, param_group_idx)
        params_grads, factor = self._clipped(params_grads)
        block = paddle.base.default_main_program().global_block()
        self._create_accumulators(block, [parameter for parameter, _ in params_grads])
        for wide in (True, False):
            pairs = [(p, g) for p, g in params_grads if (p.dtype == paddle.float32) == wide]
            adamw_step(self._tensors(pairs), (self._beta1, self._beta2), self._epsilon, factor)
        return None

    def _served(self, params_grads: Pairs | dict) -> bool:
        plain = (
            isinstance(params_grads, list)
            and kernels.available("adamw")
            and paddle.in_dynamic_mode()
            and self.regularization is None
            and self._lr_ratio is None
            and not (self._amsgrad or self._use_lowprecision_moment or self._use_fusion_storage)
            and self._get_auxiliary_var("found_inf") is None
            and all(isinstance(value, float) for value in (self._beta1, self._beta2, self._epsilon))
        )
        return plain and all(self._serves(parameter, gradient) for parameter, gradient in params_grads)

    def _serves(self, parameter: paddle.Tensor, gradient: paddle.Tensor) -> bool:
        wide = parameter.dtype == paddle.float32
        return (
            (wide or (self._multi_precision and parameter.dtype == paddle.bfloat16))
            and gradient.dtype == parameter.dtype
            and gradient.is_dense()
            and parameter.place.is_cpu_place()
            and parameter.regularizer is None
        )

    def _clipped(self, params_grads: Pairs) -> tuple[Pairs, float]:
        """The gradients to use and the factor they count with."""
        clip = self._grad_clip
        if clip is None:
            return params_grads, 1.0
        everywhere = all(getattr(parameter, "need_clip", True) for parameter, _ in params_grads)
        # Asked of the class: Fleet's wrapper forwards attributes to the clip inside, which knows one rank only.
        if everywhere and hasattr(type(clip), "clip_factor"):
            return params_grads, clip.clip_factor(params_grads)
        if everywhere and type(clip) is paddle.nn.ClipGradByGlobalNorm:
            norm = global_norm([gradient for _, gradient in params_grads])
            return params_grads, clip.clip_norm / norm if norm > clip.clip_norm else 1.0
        return clip(params_grads), 1.0

    def _tensors(self, pairs: Pairs) -> AdamWTensors:
        """The kernel's arguments for parameters of one dtype."""
        tensors, rate = AdamWTensors(), self.get_lr()
        for parameter, gradient in pairs:
            kept = parameter
            if parameter.dtype != paddle.float32:
                kept = self._master_weights[parameter.name]
                tensors.copies.append(parameter)
            decays = self._apply_decay_param_fun is None or self._apply_decay_param_fun(parameter.name)
            tensors.parameters.append(kept)
            tensors.gradients.append(gradient)
            tensors.rates.append(rate * parameter.optimize_attr["learning_rate"])
            tensors.decays.append(self._weight_decay if decays else 0.0)
            for values, kind in (
                (tensors.first, self._moment1_acc_str),
                (tensors.second, self._moment2_acc_str),
                (tensors.first_powers, self._beta1_pow_acc_str),
                (tensors.second_powers, self._beta2_pow_acc_str),
            ):
                values.append(self._accumulators[kind][kept.name])
        return tensors
