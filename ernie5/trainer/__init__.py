"""Training: PaddleNLP's ``Trainer`` with exact resume, schedules, router balancing, logs and guards."""

from ernie5.trainer.arguments import Ernie5TrainingArguments, training_arguments
from ernie5.trainer.checkpoint import forget_run, step_checkpoints
from ernie5.trainer.nonfinite import NonFiniteError
from ernie5.trainer.start import record_start, start
from ernie5.trainer.trainer import Ernie5Trainer

__all__ = [
    "Ernie5Trainer",
    "Ernie5TrainingArguments",
    "NonFiniteError",
    "forget_run",
    "record_start",
    "start",
    "step_checkpoints",
    "training_arguments",
]
