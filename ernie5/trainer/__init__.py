"""Training: PaddleNLP's ``Trainer`` with exact resume, schedules, router balancing, logs and guards."""

from ernie5.trainer.arguments import Ernie5TrainingArguments, training_arguments
from ernie5.trainer.nonfinite import NonFiniteError
from ernie5.trainer.start import record_start, start
from ernie5.trainer.trainer import Ernie5Trainer

__all__ = [
    "Ernie5Trainer",
    "Ernie5TrainingArguments",
    "NonFiniteError",
    "record_start",
    "start",
    "training_arguments",
]
