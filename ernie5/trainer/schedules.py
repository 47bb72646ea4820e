"""What grows or falls with the step: learning rate, batch size, vision bits. Pure functions of the step number.

``step`` counts finished updates, so the first update sees step 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from paddle.optimizer.lr import LRScheduler


def warmup_ratio(step: int, warmup_steps: int) -> float:
    """Linear: update n (from 1) gets n / warmup_steps, then 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def wsd_ratio(step: int, max_steps: int, warmup_steps: int, decay_fraction: float, min_ratio: float) -> float:
    """Warm-up, constant, 1 - sqrt decay to ``min_ratio`` over the last ``decay_fraction`` of steps (report §3.2)."""
    decay_steps = round(decay_fraction * max_steps)
    progress = (step - (max_steps - decay_steps)) / decay_steps if decay_steps else 0.0
    decay = 1.0 - math.sqrt(min(max(progress, 0.0), 1.0))
    return warmup_ratio(step, warmup_steps) * (min_ratio + (1.0 - min_ratio) * decay)


def cosine_ratio(step: int, max_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Warm-up, then half a cosine from 1 to ``min_ratio`` at ``max_steps`` (the report's mid-training schedule)."""
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    decay = 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return warmup_ratio(step, warmup_steps) * (min_ratio + (1.0 - min_ratio) * decay)


class LearningRate(LRScheduler):
    """``peak`` times the ratio of the chosen schedule ("wsd" or "cosine")."""

    def __init__(
        self, peak: float, schedule: str, max_steps: int, warmup_steps: int, decay_fraction: float, min_ratio: float
    ) -> None:
        if schedule not in ("wsd", "cosine"):
            raise ValueError(f"trainer.schedule: found {schedule!r}, expected 'wsd' or 'cosine'")
        self.schedule, self.max_steps, self.warmup_steps = schedule, max_steps, warmup_steps
        self.decay_fraction, self.min_ratio = decay_fraction, min_ratio
        super().__init__(peak)

    def get_lr(self) -> float:
        if self.schedule == "wsd":
            ratio = wsd_ratio(self.last_epoch, self.max_steps, self.warmup_steps, self.decay_fraction, self.min_ratio)
        else:
            ratio = cosine_ratio(self.last_epoch, self.max_steps, self.warmup_steps, self.min_ratio)
        return self.base_lr * ratio


def value_at(step: int, first: int, changes: Sequence[Sequence[int]]) -> int:
    """The value in force at ``step``: ``first``, until one of the ascending ``[step, value]`` changes is reached."""
    value = first
    for start, changed in changes:
        if step >= start:
            value = changed
    return value
