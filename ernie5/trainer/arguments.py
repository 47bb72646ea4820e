"""``TrainingArguments`` of PaddleNLP with the fields of our ``trainer`` section, and how the section fills them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ernie5.config.schema import Config
from ernie5.paddlenlp import TrainingArguments

KEPT_CHECKPOINTS = 2


@dataclass
class Ernie5TrainingArguments(TrainingArguments):
    """Names as in ``TrainerConfig``, where PaddleNLP has no field of that meaning."""

    schedule: str = "wsd"
    decay_fraction: float = 0.3
    min_learning_rate_ratio: float = 0.02
    batch_ramp: list = field(default_factory=list)  # [[step, accumulation], ...]
    bits_schedule: list = field(default_factory=list)  # [[step, bits], ...]
    router_bias_speed: float = 1.0e-3
    mtp_weight: float = 0.3
    modality_weight_min: float = 0.5
    modality_weight_max: float = 2.0
    modality_weights: dict = field(default_factory=dict)
    async_save: bool = True


def training_arguments(config: Config, output_dir: str | Path) -> Ernie5TrainingArguments:
    """Arguments for ``Ernie5Trainer`` from ``config.trainer`` and ``config.data.workers``; ``output_dir`` is the run's.

    Everything of PaddleNLP that costs time and is not used (its reports, timers, memory tracking) is off.
    """
    trainer = config.trainer
    return Ernie5TrainingArguments(
        output_dir=str(output_dir),
        logging_dir=str(Path(output_dir) / "vdl"),
        max_steps=trainer.max_steps,
        per_device_train_batch_size=trainer.rows_per_step,
        gradient_accumulation_steps=trainer.gradient_accumulation,
        batch_ramp=trainer.batch_ramp,
        learning_rate=trainer.learning_rate,
        schedule=trainer.schedule,
        warmup_steps=trainer.warmup_steps,
        decay_fraction=trainer.decay_fraction,
        min_learning_rate_ratio=trainer.min_learning_rate_ratio,
        adam_beta1=trainer.adam_beta1,
        adam_beta2=trainer.adam_beta2,
        adam_epsilon=trainer.adam_eps,
        weight_decay=trainer.weight_decay,
        max_grad_norm=trainer.clip_norm,
        router_bias_speed=trainer.router_bias_speed,
        mtp_weight=trainer.mtp_weight,
        modality_weight_min=trainer.modality_weight_min,
        modality_weight_max=trainer.modality_weight_max,
        modality_weights=trainer.modality_weights,
        bits_schedule=trainer.bits_schedule,
        save_steps=trainer.save_steps,
        async_save=trainer.async_save,
        save_total_limit=KEPT_CHECKPOINTS,
        logging_steps=trainer.log_steps,
        logging_first_step=True,
        seed=trainer.seed,
        dataloader_num_workers=config.data.workers,
        ignore_data_skip=True,  # the loader starts at the cursor
        release_grads=True,  # the next backward writes gradients instead of adding to zeros
        report_to="none",
        skip_memory_metrics=True,
        skip_profile_timer=True,
    )
