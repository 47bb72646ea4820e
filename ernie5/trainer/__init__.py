"""Training: PaddleNLP's ``Trainer`` with exact resume, schedules, router balancing, logs and guards.

What needs PaddleNLP's trainer is imported when it is asked for, so the optimizer alone costs neither its two seconds
nor its 200 MB.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ernie5.trainer.nonfinite import NonFiniteError
from ernie5.trainer.start import record_start, start

if TYPE_CHECKING:
    from ernie5.trainer.arguments import Ernie5TrainingArguments, training_arguments
    from ernie5.trainer.trainer import Ernie5Trainer

LATER = {
    "Ernie5Trainer": "ernie5.trainer.trainer",
    "Ernie5TrainingArguments": "ernie5.trainer.arguments",
    "training_arguments": "ernie5.trainer.arguments",
}

__all__ = [
    "Ernie5Trainer",
    "Ernie5TrainingArguments",
    "NonFiniteError",
    "record_start",
    "start",
    "training_arguments",
]


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LATER[name]), name)
