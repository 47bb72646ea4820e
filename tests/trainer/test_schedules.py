"""Schedules against their closed forms."""

from __future__ import annotations

import math

import pytest

from ernie5.trainer.schedules import LearningRate, cosine_ratio, value_at, wsd_ratio

RAMP = [[3, 2], [7, 5]]


@pytest.mark.parametrize("warmup, fraction, floor", [(10, 0.3, 0.02), (0, 0.5, 0.0), (5, 0.0, 0.1), (1, 1.0, 0.1)])
def test_wsd_is_warmup_constant_then_one_minus_sqrt(warmup: int, fraction: float, floor: float) -> None:
    steps = 100
    for step in range(steps):
        expected = (step + 1) / warmup if step < warmup else 1.0
        left = step - steps * (1 - fraction)
        if fraction and left > 0:
            expected *= floor + (1 - floor) * (1 - math.sqrt(left / (fraction * steps)))
        assert wsd_ratio(step, steps, warmup, fraction, floor) == pytest.approx(expected, rel=1e-9)
    assert wsd_ratio(steps, steps, warmup, fraction, floor) == pytest.approx(floor if fraction else 1.0)


def test_cosine_falls_from_one_to_the_floor() -> None:
    assert cosine_ratio(10, 110, 10, 0.1) == pytest.approx(1.0)
    assert cosine_ratio(60, 110, 10, 0.1) == pytest.approx(0.55)
    assert cosine_ratio(110, 110, 10, 0.1) == pytest.approx(0.1)
    assert cosine_ratio(4, 110, 10, 0.1) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_learning_rate_follows_its_ratio_and_resumes(schedule: str) -> None:
    first = LearningRate(2.0e-3, schedule, 40, 4, 0.25, 0.02)
    seen = []
    for _ in range(40):
        seen.append(first.last_lr)
        first.step()
    ratios = [wsd_ratio(s, 40, 4, 0.25, 0.02) if schedule == "wsd" else cosine_ratio(s, 40, 4, 0.02) for s in range(40)]
    assert seen == pytest.approx([2.0e-3 * ratio for ratio in ratios])
    later = LearningRate(2.0e-3, schedule, 40, 4, 0.25, 0.02)
    for _ in range(17):
        later.step()
    resumed = LearningRate(2.0e-3, schedule, 40, 4, 0.25, 0.02)
    resumed.set_state_dict(later.state_dict())
    resumed.step()
    assert resumed.last_lr == seen[18]


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.schedule: found 'linear'"):
        LearningRate(1.0, "linear", 10, 1, 0.1, 0.0)


def test_changes_hold_from_their_step_on() -> None:
    assert [value_at(step, 1, RAMP) for step in range(9)] == [1, 1, 1, 2, 2, 2, 2, 5, 5]
    assert value_at(4, 8, []) == 8
