"""``FusedAdamW`` against ``paddle.optimizer.AdamW``: values, clipping, decay, state, and where it steps aside."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle.optimizer import AdamW

from ernie5.ops import adamw, kernels
from ernie5.trainer.fused_adamw import FusedAdamW

SHAPES = {"matrix": [37, 53], "norm": [53], "scalar": [1], "stack": [3, 100, 70], "unused": [5]}
NEEDS_KERNEL = pytest.mark.skipif(not kernels.available("adamw"), reason="the kernels could not be compiled here")


class Model(paddle.nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        paddle.seed(3)
        for name, shape in SHAPES.items():
            setattr(self, name, self.create_parameter(shape, default_initializer=paddle.nn.initializer.Normal()))
        self.norm.optimize_attr["learning_rate"] = 0.5


class Factor(paddle.nn.ClipGradByGlobalNorm):
    """A clip that leaves the gradients alone."""

    def clip_factor(self, params_grads: list) -> float:
        norm = adamw.global_norm([gradient for _, gradient in params_grads])
        return min(1.0, self.clip_norm / norm)


def build(kind: type, clip: object = None, **more: object) -> tuple[Model, AdamW]:
    model = Model()
    decayed = {p.name for name, p in model.named_parameters() if name in ("matrix", "stack")}
    schedule = paddle.optimizer.lr.LambdaDecay(0.02, lambda step: 1.0 / (step + 1))
    settings = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "apply_decay_param_fun": decayed.__contains__}
    return model, kind(schedule, parameters=model.parameters(), grad_clip=clip, **(settings | more))


def train(model: Model, optimizer: AdamW, steps: range) -> None:
    for step in steps:
        for p, (name, shape) in zip(model.parameters(), SHAPES.items(), strict=True):
            if name != "unused" and not (name == "scalar" and step == 1):  # one parameter misses a step
                rng = np.random.default_rng((len(name), step))
                p.grad = paddle.to_tensor(rng.normal(size=shape).astype(np.float32) * 10.0 ** (step - 3))
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        optimizer._learning_rate.step()


def values(model: Model) -> dict[str, np.ndarray]:
    return {name: p.numpy() for name, p in model.named_parameters()}


def state(optimizer: AdamW) -> dict[str, np.ndarray]:
    """State by the accumulator's place: the automatic names of two models' parameters differ."""
    found = {key: value for key, value in optimizer.state_dict().items() if key != "LR_Scheduler"}
    return {f"{i} {key[key.index('.w_') + 4 :]}": value.numpy() for i, (key, value) in enumerate(found.items())}


def assert_close(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=3e-6, atol=1e-7, err_msg=name)


@NEEDS_KERNEL
@pytest.mark.parametrize("clip", [None, paddle.nn.ClipGradByGlobalNorm, paddle.nn.ClipGradByValue])
def test_five_steps_equal_paddles(clip, monkeypatch) -> None:
    ours, stock = (build(kind, clip and clip(1.0)) for kind in (FusedAdamW, AdamW))
    train(*stock, range(5))
    monkeypatch.setattr(paddle._C_ops, "adamw_", None)  # the stock step would fail
    train(*ours, range(5))
    assert_close(values(ours[0]), values(stock[0]))
    assert_close(state(ours[1]), state(stock[1]))


@NEEDS_KERNEL
def test_a_clip_may_give_its_factor_only() -> None:
    ours, stock = build(FusedAdamW, Factor(1.0)), build(AdamW, paddle.nn.ClipGradByGlobalNorm(1.0))
    for each in (ours, stock):
        train(*each, range(5))
    assert_close(values(ours[0]), values(stock[0]))


@NEEDS_KERNEL
def test_state_goes_round_and_training_goes_on_bit_equal() -> None:
    whole, first = build(FusedAdamW), build(FusedAdamW)
    train(*whole, range(5))
    train(*first, range(3))
    saved = {key: value.numpy() if paddle.is_tensor(value) else value for key, value in first[1].state_dict().items()}
    second = build(FusedAdamW)
    names = {old.name: new.name for old, new in zip(first[0].parameters(), second[0].parameters(), strict=True)}
    for old, new in zip(first[0].parameters(), second[0].parameters(), strict=True):
        new.set_value(old.numpy())
    second[1].set_state_dict({_renamed(key, names): value for key, value in saved.items()})
    train(*second, range(3, 5))
    for name, value in values(whole[0]).items():
        np.testing.assert_array_equal(values(second[0])[name], value)
    for name, value in state(whole[1]).items():
        np.testing.assert_array_equal(state(second[1])[name], value)


def _renamed(key: str, names: dict[str, str]) -> str:
    return next((new + key[len(old) :] for old, new in names.items() if key.startswith(old + "_")), key)


@pytest.mark.parametrize("more", [{}, {"amsgrad": True}])
def test_paddles_own_step_serves_what_the_kernel_does_not(more, monkeypatch) -> None:
    if not more:
        monkeypatch.setattr(kernels, "available", lambda name: False)
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    ours, stock = (build(kind, clip, **more) for kind in (FusedAdamW, AdamW))
    for each in (ours, stock):
        train(*each, range(3))
    for name, value in values(stock[0]).items():
        np.testing.assert_array_equal(values(ours[0])[name], value)


@NEEDS_KERNEL
@pytest.mark.parametrize("half", [False, True])
def test_the_reference_is_the_kernel(half, monkeypatch) -> None:
    results = []
    for served in (True, False):
        if not served:
            monkeypatch.setattr(kernels, "available", lambda name: False)
        paddle.seed(5)
        t = adamw.AdamWTensors(rates=[0.01, 0.02], decays=[0.0, 0.1])
        for shape in ([7, 9], [40]):
            gradient = paddle.randn(shape)
            t.gradients.append(gradient.astype("bfloat16") if half else gradient)
            t.parameters.append(paddle.randn(shape))
            t.first.append(paddle.randn(shape))
            t.second.append(paddle.rand(shape))
            t.first_powers.append(paddle.full([1], 0.81))
            t.second_powers.append(paddle.full([1], 0.9))
            t.copies.append(paddle.zeros(shape, dtype="bfloat16"))
        norm = adamw.global_norm(t.gradients)
        adamw.adamw_step(t, (0.9, 0.95), 1e-8, 0.3)
        groups = (t.parameters, t.first, t.second, t.first_powers, t.second_powers)
        copies = [copy.astype("float32").numpy() for copy in t.copies]
        results.append((norm, [tensor.numpy() for group in groups for tensor in group], copies))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for i, rtol in ((1, 3e-6), (2, 2.0**-7)):
        for got, wanted in zip(results[0][i], results[1][i], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=rtol, atol=1e-7)


@NEEDS_KERNEL
def test_bfloat16_parameters_follow_their_float32_masters() -> None:
    model = Model()
    model.to(dtype="bfloat16")
    optimizer = FusedAdamW(0.01, parameters=model.parameters(), multi_precision=True)
    before = [p.astype("float32").numpy() for p in model.parameters()]
    for p in model.parameters():
        p.grad = paddle.ones_like(p)
    optimizer.step()
    for p, value in zip(model.parameters(), before, strict=True):
        rate, master = 0.01 * p.optimize_attr["learning_rate"], optimizer._master_weights[p.name].numpy()
        np.testing.assert_allclose(master, value * (1 - rate * 0.01) - rate, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(p.numpy(), paddle.to_tensor(master).astype("bfloat16").numpy())
