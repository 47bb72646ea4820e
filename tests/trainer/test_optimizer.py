"""AdamW with clipping against a float64 reference; which parameters decay."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie5.trainer.optimizer import GuardedClip, build_optimizer, decays
from tests.trainer.tiny_run import tiny_model


def refuse(norm: float) -> None:
    raise ValueError(f"norm {norm}")


class TwoParameters(paddle.nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = self.create_parameter([4, 3])
        self.norm = self.create_parameter([3])


@pytest.mark.parametrize("clip_norm", [0.5, 1.0e3, 0.0])
def test_updates_match_the_formulas(clip_norm: float) -> None:
    paddle.seed(1)
    model = TwoParameters()
    clip = GuardedClip(clip_norm, refuse)
    schedule = paddle.optimizer.lr.LambdaDecay(0.01, lambda step: 1.0 / (step + 1))
    optimizer = build_optimizer(model, schedule, (0.9, 0.95), 1e-8, 0.1, clip)
    want = {name: p.numpy().astype(np.float64) for name, p in model.named_parameters()}
    first = {name: np.zeros_like(value) for name, value in want.items()}
    second = {name: np.zeros_like(value) for name, value in want.items()}
    rng = np.random.default_rng(0)
    for step in range(1, 4):
        target = {name: rng.normal(size=value.shape) for name, value in want.items()}
        loss = sum((p * paddle.to_tensor(target[name], dtype="float32")).sum() for name, p in model.named_parameters())
        loss.backward()
        norm = np.sqrt(sum((value**2).sum() for value in target.values()))
        scale = clip_norm / norm if 0 < clip_norm < norm else 1.0
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        assert clip.norm == pytest.approx(norm, rel=1e-6)
        rate = 0.01 / step
        schedule.step()
        for name in want:
            grad = target[name] * scale
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            decay = 0.1 if name == "matrix" else 0.0
            want[name] *= 1 - rate * decay
            want[name] -= rate * (first[name] / (1 - 0.9**step)) / (np.sqrt(second[name] / (1 - 0.95**step)) + 1e-8)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.numpy(), want[name], rtol=2e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_refused_before_the_update() -> None:
    model = TwoParameters()
    before = {name: p.numpy() for name, p in model.named_parameters()}
    optimizer = build_optimizer(
        model, paddle.optimizer.lr.LambdaDecay(0.1, float), (0.9, 0.95), 1e-8, 0.1, GuardedClip(1.0, refuse)
    )
    (model.matrix.sum() * float("nan") + model.norm.sum()).backward()
    with pytest.raises(ValueError, match="norm nan"):
        optimizer.step()
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(p.numpy(), before[name])


def test_only_matrices_decay() -> None:
    decayed = {name for name, p in tiny_model().named_parameters() if decays(name, p)}
    assert {"layers.0.moe.experts.gate_up", "layers.1.attention.q_proj.weight", "bit_head.weight"} <= decayed
    spared = ("norm", "bias", "embedding.tokens.weight", "embedding.audio.weight", "embedding.vision.scales")
    assert not [name for name in decayed if name.endswith(spared) or "norm" in name]
