"""What happens around an update: batch ramp, router balancing, the log, the progress bar, the dashboards."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ernie5.paddlenlp import TrainerCallback
from ernie5.trainer.metrics import interval_means, load_metrics
from ernie5.trainer.schedules import value_at

if TYPE_CHECKING:
    from ernie5.paddlenlp import TrainerControl, TrainerState
    from ernie5.trainer.arguments import Ernie5TrainingArguments
    from ernie5.trainer.trainer import Ernie5Trainer

HISTOGRAM_EVERY = 10  # logged intervals between two histograms of the expert load


class Schedules(TrainerCallback):
    """Sets the gradient accumulation of the coming step, and says when the vision codes grow."""

    def __init__(self, trainer: Ernie5Trainer) -> None:
        self.trainer = trainer
        self.bits: int | None = None

    def on_step_begin(
        self, args: Ernie5TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        args.gradient_accumulation_steps = value_at(state.global_step, self.trainer.first_accumulation, args.batch_ramp)
        bits = value_at(state.global_step, 0, args.bits_schedule)
        if bits and self.bits and bits != self.bits and state.is_world_process_zero:
            tqdm.write(f"step {state.global_step}: vision codes grow from {self.bits} to {bits} bits", file=sys.stderr)
        self.bits = bits


class RouterBalance(TrainerCallback):
    """Aux-loss-free balancing (report §2.1; arXiv 2408.15664) after every update, from the counts of its forwards.

    The weights of the losses follow in the same way what was observed in the step.
    """

    def __init__(self, trainer: Ernie5Trainer) -> None:
        self.trainer = trainer

    def on_optimizer_end(
        self, args: Ernie5TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        trainer = self.trainer
        if trainer.worker is not None:
            trainer.worker.sum_router_counts()
        trainer.interval.add_load(trainer.model.expert_load())
        trainer.model.update_router_bias(args.router_bias_speed)
        losses = trainer.step_meter.losses
        trainer.model.loss_weights.observe({name.removeprefix("loss/"): value for name, value in losses.items()})


class StepLog(TrainerCallback):
    """One line a step in ``train_log.jsonl``; keeps the data cursor in PaddleNLP's state."""

    def __init__(self, trainer: Ernie5Trainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: Ernie5TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        state.consumed_samples = self.trainer.loader.cursor
        record = self.trainer.finish_step()
        if state.is_world_process_zero:
            self.trainer.log_file.append(record)


class LifeSigns(TrainerCallback):
    """Tells the watchdog of several processes which step this is, and when the others may have to wait for long."""

    def __init__(self, trainer: Ernie5Trainer) -> None:
        self.watchdog = trainer.worker.topology.watchdog if trainer.worker else None

    def on_step_begin(
        self, args: Ernie5TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.watchdog is not None:
            self.watchdog.working_on(state.global_step + 1)

    def on_step_end(
        self, args: Ernie5TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.watchdog is not None:
            ends = state.global_step >= state.max_steps
            self.watchdog.may_take_long("saving" if control.should_save or ends else "")


class Progress(TrainerCallback):
    """tqdm over the steps with time left, loss and tokens/s; into a file it writes a line every ten seconds at most."""

    def __init__(self, trainer: Ernie5Trainer) -> None:
        self.trainer = trainer
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: Ernie5TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            pause = 0.5 if sys.stderr.isatty() else 10.0
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="train", unit="step", mininterval=pause
            )

    def on_step_end(
        self, args: Ernie5TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.bar is not None:
            record = self.trainer.record
            shown = f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tok/s"
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(
        self, args: Ernie5TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Dashboards(TrainerCallback):
    """VisualDL under ``logging_dir``; a resumed run rewrites it from the step log, so that curves never fork."""

    def __init__(self, trainer: Ernie5Trainer) -> None:
        self.trainer = trainer
        self.writer = None
        self.logged = 0

    def on_train_begin(
        self, args: Ernie5TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero:
            return
        from visualdl import LogWriter  # half a second, and only here

        shutil.rmtree(args.logging_dir, ignore_errors=True)
        self.writer = LogWriter(logdir=str(Path(args.logging_dir)))
        interval: list[dict] = []
        for record in self.trainer.log_file.records():
            interval.append(record)
            if record["step"] == 1 or record["step"] % args.logging_steps == 0:
                self._scalars(interval_means(interval), record["step"])
                interval = []
        self.trainer.interval.records = interval

    def on_log(
        self, args: Ernie5TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self.trainer.interval.records:
            return
        means, load = self.trainer.interval.finish()
        if load is not None and self.trainer.worker is not None:
            load = self.trainer.worker.whole_load(load)
        if self.writer is None:
            return
        self._scalars(means, state.global_step)
        if load is not None:
            self._load(load, state.global_step)
        self.logged += 1

    def on_train_end(
        self, args: Ernie5TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _scalars(self, means: dict[str, float], step: int) -> None:
        for name, value in means.items():
            self.writer.add_scalar(tag=name if name.startswith("loss") else f"run/{name}", step=step, value=value)

    def _load(self, load: np.ndarray, step: int) -> None:
        for name, values in load_metrics(load).items():
            for router, value in enumerate(values):
                self.writer.add_scalar(tag=f"experts/{name}/router_{router:02d}", step=step, value=float(value))
        if self.logged % HISTOGRAM_EVERY == 0:
            share = load / np.maximum(load.sum(-1, keepdims=True), 1) * load.shape[-1]
            for router, values in enumerate(share):
                self.writer.add_histogram(tag=f"experts/load/router_{router:02d}", values=values.tolist(), step=step)
