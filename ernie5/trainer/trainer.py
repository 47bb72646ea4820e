"""``Ernie5Trainer``: PaddleNLP's loop with our data order, schedules, router balancing, exact resume and guards."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import paddle
from tqdm import tqdm

from ernie5.checkpoint import ALONE, Checkpoint, Held, Part, Saver, Tensors, checkpoints_dir, step_checkpoints
from ernie5.checkpoint.export import CONFIG, export_weights
from ernie5.checkpoint.run import FINAL
from ernie5.checkpoint.state import MODEL, OPTIMIZER, held_moments, held_weights, load_moments, load_weights
from ernie5.model.losses import total_weights
from ernie5.paddlenlp import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from ernie5.trainer.arguments import Ernie5TrainingArguments
from ernie5.trainer.callbacks import Dashboards, LifeSigns, Progress, RouterBalance, Schedules, StepLog
from ernie5.trainer.loader import RowLoader
from ernie5.trainer.log import TrainLog
from ernie5.trainer.metrics import IntervalMeter, StepMeter
from ernie5.trainer.nonfinite import NonFiniteError, dump
from ernie5.trainer.optimizer import GuardedClip, build_optimizer
from ernie5.trainer.schedules import LearningRate, value_at
from ernie5.trainer.state import TRAINER_STATE, TRAINING, random_text, read_training, restore_random, training_text


class Ernie5Trainer(Trainer):
    """Trains ``model`` on rows 0, 1, 2 ... of ``train_dataset`` and writes everything under ``args.output_dir``.

    ``model(**batch)`` returns ``{"loss": scalar, "losses": {name: scalar}, "tokens": count}``; ``train_dataset[i]`` is
    a pure function of i. ``data_collator`` makes a dict of numpy arrays of a list of rows (default: the packed batch of
    ``ernie5.sequence``). ``train(resume=True)`` continues bit-equal from the newest checkpoint, or starts without one.
    ``worker`` (``ernie5.parallel.worker``) does the steps where several processes train; ``model`` is then its part.
    """

    def __init__(
        self,
        model: paddle.nn.Layer,
        args: Ernie5TrainingArguments,
        train_dataset: Any,
        data_collator: Callable[[list], Mapping[str, np.ndarray]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        worker: Any = None,
    ) -> None:
        self.worker = worker
        self.processes = worker.processes if worker else ALONE
        self.saver: Saver | None = None
        self._source: Checkpoint | None = None  # of a run that continues
        self._saved_step = -1
        self.run_dir = Path(args.output_dir)
        self.first_accumulation = args.gradient_accumulation_steps
        self.loader: RowLoader | None = None
        self.log_file = TrainLog(self.run_dir)
        self.step_meter, self.interval, self.record = StepMeter(), IntervalMeter(), {}
        self.clip = GuardedClip(args.max_grad_norm, self._refuse_gradient)
        own = [kind(self) for kind in (Schedules, RouterBalance, StepLog, LifeSigns, Progress, Dashboards)]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator or _packed_collate(),
            callbacks=[*own, *callbacks],
        )
        self.shapes = worker.shapes if worker else {n: tuple(t.shape) for n, t in model.state_dict().items()}
        self.part_of = worker.part_of if worker else lambda name: Part(self.shapes[name])
        for replaced in (ProgressCallback, PrinterCallback):
            self.remove_callback(replaced)
        model.set_loss_weights(
            args.mtp_weight, args.modality_weight_min, args.modality_weight_max, args.modality_weights
        )

    # ------------------------------------------------------------------ running

    def train(self, resume: bool = False) -> None:
        """Runs to ``args.max_steps``; leaves a checkpoint of the last step and the weights in ``checkpoints/final``.

        Raises ``ValueError`` if the folder holds a run and ``resume`` is False, or if a checkpoint does not fit;
        ``NonFiniteError`` before an update that a NaN or infinity would spoil.
        """
        start = self.processes.on_first(lambda: self._starting_point(resume))
        self.saver = Saver(
            self.run_dir, self.processes, self.args.save_total_limit, self.args.async_save, self._announce
        )
        with ExitStack() as opened:
            if start:
                self._source = opened.enter_context(Checkpoint(start))
                self._source.verify(self.processes)
                self._saved_step = self._source.step
            self._train()
        self.saver.finish()
        with Checkpoint(checkpoints_dir(self.run_dir) / f"step-{self._saved_step}") as last:
            export_weights(last, checkpoints_dir(self.run_dir) / FINAL, self.processes)

    def _train(self) -> None:
        if self._saved_step >= self.args.max_steps:
            self._load_from_checkpoint(self._source.folder)
            return
        self._first_row = read_training(self._source)["rows_consumed"] if self._source else 0
        # PaddleNLP sizes its loop once: with the largest accumulation it can never end a step early.
        ramp = [accumulation for _, accumulation in self.args.batch_ramp]
        self.args.gradient_accumulation_steps = max([self.first_accumulation, *ramp])
        gc.freeze()  # else the collector walks all of Paddle's objects again and again: 3 % of a step, and jitter
        try:
            super().train(resume_from_checkpoint=str(self._source.folder) if self._source else None)
        finally:
            gc.unfreeze()
            self._close()
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(self.model)

    def _starting_point(self, resume: bool) -> Path | None:
        found = step_checkpoints(self.run_dir)
        if found and not resume:
            raise ValueError(
                f"{self.run_dir} already holds a run (newest checkpoint: {found[-1].name}); continue it with resume, "
                "start it afresh, or choose another run.dir"
            )
        if not found:
            self.log_file.path.unlink(missing_ok=True)  # lines of a run that was stopped before its first checkpoint
        return found[-1] if found else None

    def _announce(self, name: str, seconds: float) -> None:
        tqdm.write(f"checkpoint {name} is complete after {seconds:.1f} s", file=sys.stderr)

    def _close(self) -> None:
        if self.loader is not None:
            self.loader.close()
        self.saver.wait()
        self.log_file.close()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Progress | Dashboards):
                callback.close()

    def get_train_dataloader(self) -> RowLoader:
        self.loader = RowLoader(
            self.train_dataset,
            self.data_collator,
            rows=self.args.per_device_train_batch_size,
            start_row=self._first_row,
            rank=self.worker.row_rank if self.worker else 0,
            world=self.worker.row_ranks if self.worker else 1,
            workers=self.args.dataloader_num_workers,
        )
        return self.loader

    def create_scheduler(self, num_training_steps: int) -> LearningRate:
        args = self.args
        if self.lr_scheduler is None:
            self.lr_scheduler = LearningRate(
                args.learning_rate,
                args.schedule,
                num_training_steps,
                args.warmup_steps,
                args.decay_fraction,
                args.min_learning_rate_ratio,
            )
        return self.lr_scheduler

    def create_optimizer(self, lr_scheduler: LearningRate | None = None) -> paddle.optimizer.Optimizer:
        args = self.args
        if self.optimizer is None:
            betas = (args.adam_beta1, args.adam_beta2)
            optimizer = build_optimizer(
                self.model, self.lr_scheduler, betas, args.adam_epsilon, args.weight_decay, self.clip
            )
            self.optimizer = self.worker.optimizer(optimizer) if self.worker else optimizer
        return self.optimizer

    def _wrap_model(self, model: paddle.nn.Layer, training: bool = True) -> paddle.nn.Layer:
        """Nothing: the worker adds up gradients, and its model is split already."""
        return model

    # ------------------------------------------------------------------ one step

    def training_step(
        self, model: paddle.nn.Layer, inputs: Mapping[str, np.ndarray], step_control: int = 0
    ) -> paddle.Tensor:
        """Forward and backward of one micro-batch, whose losses are its share of the step's.

        With a worker the first call does the whole step.
        """
        if not model.training:
            model.train()
        self._batch, self._learning_rate = inputs, self.lr_scheduler.last_lr
        if step_control == 0:
            step = [inputs, *self.loader.upcoming(self.args.gradient_accumulation_steps - 1)]
            if self.worker:
                return self._whole_step(step)
            self._total = total_weights(step, model.config.mtp_depth > 0)
        elif self.worker:
            self.step_meter.add({}, 0, self.loader.last_rows)
            return paddle.zeros([])
        with self.autocast_smart_context_manager():
            outputs = model(total=self._total, **{name: paddle.to_tensor(value) for name, value in inputs.items()})
        loss = outputs["loss"]
        losses = {"loss": loss, **{f"loss/{name}": value for name, value in outputs["losses"].items()}}
        values = paddle.stack([value.detach().astype("float64").reshape([]) for value in losses.values()]).tolist()
        losses = dict(zip(losses, values, strict=True))
        self.step_meter.add(losses, int(outputs["tokens"]), self.loader.last_rows)
        if not np.isfinite(values).all():
            self._refuse("loss", losses)
        loss.backward()
        return loss.detach()

    def _whole_step(self, batches: list[Mapping[str, np.ndarray]]) -> paddle.Tensor:
        found = self.worker.forward_backward(batches)
        tokens = int(found.pop("tokens"))
        losses = {name if name == "loss" else f"loss/{name}": value for name, value in found.items()}
        self.step_meter.add(losses, tokens, self.loader.last_rows)
        if not np.isfinite(list(losses.values())).all():
            self._refuse("loss", losses)
        return paddle.to_tensor(losses["loss"])

    def finish_step(self) -> dict[str, float]:
        """Closes the record of the step just taken; it is kept as ``record`` and for the next interval."""
        step = self.state.global_step
        self.record = {"step": step, **self.step_meter.finish()}
        self.record["learning_rate"] = self._learning_rate
        self.record["grad_norm"] = self.clip.norm
        self.record["rows_consumed"] = self.loader.cursor
        self.record["accumulation"] = self.args.gradient_accumulation_steps
        if self.args.bits_schedule:
            self.record["vision_bits"] = value_at(step - 1, 0, self.args.bits_schedule)
        self.interval.records.append(self.record)
        return self.record

    def _refuse_gradient(self, norm: float) -> NoReturn:
        self._refuse("gradient norm", {"grad_norm": norm})

    def _refuse(self, quantity: str, values: dict[str, float]) -> NoReturn:
        """Leaves the dump and raises: nothing of this step has reached the parameters."""
        step, rows = self.state.global_step + 1, list(self.step_meter.rows)
        if not self.is_world_process_zero():
            raise NonFiniteError(f"step {step}: {quantity} is not finite; the first process says more")
        path = dump(self.run_dir, step, quantity, values, rows, self.loader, self._batch)
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        raise NonFiniteError(
            f"step {step}: {quantity} is not finite ({shown}) on rows {rows[0]}..{rows[-1]}; stopped before the "
            f"update. {path} names the documents; lower trainer.learning_rate or mend the data, then resume"
        )

    # ------------------------------------------------------------------ checkpoints

    def save_model(self, output_dir: str | Path, merge_tensor_parallel: bool = False) -> None:
        """The whole model's weights in ``output_dir``, complete or absent, for ``from_pretrained``.

        Every process calls it.
        """
        output_dir = Path(output_dir)
        staging = output_dir.with_name(f".{output_dir.name}.parts")
        saver = Saver(staging, self.processes, background=False)
        saver.save(0, {MODEL: self._weights()}, "{}", {CONFIG: self.model.config.to_json_string()})
        with Checkpoint(checkpoints_dir(staging) / "step-0") as parts:
            export_weights(parts, output_dir, self.processes)
        if self.processes.first:
            shutil.rmtree(staging)

    def _save_checkpoint(self, model: paddle.nn.Layer, metrics: dict | None = None) -> None:
        step = self.state.global_step
        self.state.consumed_samples = self.loader.cursor
        tensors: Tensors = {
            MODEL: self._weights(),
            OPTIMIZER: held_moments(self.model, self.optimizer, self.part_of),
        }
        shared = {
            CONFIG: self.model.config.to_json_string(),
            TRAINING: training_text(step, self.loader.cursor, self.lr_scheduler.state_dict()),
            TRAINER_STATE: json.dumps(asdict(self.state), indent=2),
        }
        self.saver.save(step, tensors, random_text(), shared, self.log_file.so_far())
        self._saved_step = step

    def _weights(self) -> dict[str, Held]:
        return held_weights(self.model, self.optimizer, self.part_of)

    def _load_from_checkpoint(self, resume_from_checkpoint: str | Path | None = None) -> None:
        if resume_from_checkpoint is not None:
            self._source.check_names(MODEL, self.shapes)
            load_weights(self.model, self._source, self.part_of)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_moments(self.model, self.optimizer, self._source, self.shapes, self.part_of)
        self.lr_scheduler.set_state_dict(read_training(self._source)["learning_rate"])
        restore_random(self._source, self.processes.rank, self.processes.count)
        if self.processes.first:
            self.log_file.restore_from(self._source.folder)


def _packed_collate() -> Callable[[list], Mapping[str, np.ndarray]]:
    from ernie5.sequence.packing import collate

    return collate
