#!/usr/bin/env python
"""What ``tools/plan.py`` predicts against what training takes: peak memory, and the order of step times.

    python benchmarks/plan_accuracy.py --json out.json

Every run has processes of its own, as many as its layout asks for, on rows of text. Memory is the most that a process
holds resident, less what it held before the model was built; glibc gives freed blocks back there, so that what counts
is what is in use (training keeps them: the planner's ``slack``). Time is the fastest of a few steps. The prediction is
that of the machine ``laptop``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import common, worker  # noqa: E402
from ernie5.config import Config, ModelConfig, ParallelConfig, TrainerConfig, model_preset  # noqa: E402
from ernie5.planning import Plan, load_machine, make_plan  # noqa: E402

STEPS = 3
TIME_LIMIT = 300  # seconds of one run
CLEAR = 1.1  # ratio of two measured times from which their order is expected to be predicted
GIVE_BACK = {"ERNIE5_KEEP_ALLOCATOR": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
# So that mini takes seconds a step on a laptop.
SMALLER = {"nano": {}, "mini": {"num_layers": 2, "audio_levels": 2, "num_experts": 16, "max_sequence_length": 256}}


@dataclass(frozen=True)
class Run:
    """A preset, what is changed in it, a layout and its number of processes."""

    name: str
    preset: str
    rows: int
    accumulation: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    processes: int = 1

    def config(self) -> Config:
        model = replace(model_preset(self.preset), **SMALLER[self.preset], **self.model)
        trainer = TrainerConfig(rows_per_step=self.rows, gradient_accumulation=self.accumulation)
        return Config(model=model, trainer=trainer, parallel=ParallelConfig(**self.parallel))

    def plan(self) -> Plan:
        return make_plan(self.name, self.config(), load_machine("laptop"), self.processes)


RUNS = (
    Run("nano, 8 rows", "nano", 8),
    Run("nano, 32 rows", "nano", 32),
    Run("nano, 32 rows, recompute", "nano", 32, model={"recompute": True}),
    Run("nano, 4 x 8 rows", "nano", 8, 4),
    Run("mini, 1 row", "mini", 1),
    Run("mini, 4 rows", "mini", 4),
    Run("mini, 4 rows, recompute", "mini", 4, model={"recompute": True}),
    Run("mini, 4 rows, recompute, sub-batches", "mini", 4, model={"recompute": True, "moe_sub_batch": 256}),
)


# ---------------------------------------------------------------------- in a process of the run


class SingleProcess:
    """One process that trains the whole model: forward and backward of every micro-batch, then AdamW."""

    def __init__(self, config: Config) -> None:
        import paddle

        from ernie5.model import Ernie5Config, Ernie5ForCausalLM
        from ernie5.trainer.optimizer import GuardedClip, build_optimizer

        self.count = config.trainer.gradient_accumulation
        self.model = Ernie5ForCausalLM(Ernie5Config.from_model_config(config.model))
        self.model.train()
        rate, clip = paddle.optimizer.lr.StepDecay(1e-4, 1000), GuardedClip(1.0, lambda norm: None)
        self.optimizer = build_optimizer(self.model, rate, (0.9, 0.95), 1e-8, 0.1, clip)
        self.rows = text_rows(config.model, config.trainer.rows_per_step * self.count)

    def step(self) -> None:
        import paddle

        for part in micro_batches(self.rows, self.count):
            batch = {name: paddle.to_tensor(values) for name, values in part.items()}
            (self.model(**batch)["loss"] / self.count).backward()
        self.optimizer.step()
        for parameter in self.model.parameters():
            parameter.clear_gradient(False)


def text_rows(model: ModelConfig, count: int) -> list[dict[str, Any]]:
    """Packed rows of one document of random words each."""
    import numpy as np

    from benchmarks.train_step import Given
    from ernie5.model import Ernie5Config
    from ernie5.sequence.layout import lay_out
    from ernie5.sequence.packing import pack
    from ernie5.sequence.parts import Sample, Text
    from ernie5.sequence.spec import LayoutSpec

    spec = LayoutSpec.of_model(Ernie5Config.from_model_config(model), (1, 2), [model.vision_bits])
    length = model.max_sequence_length
    words = np.random.default_rng(0).integers(16, model.vocab_size, (count, length - 2))
    return [pack([lay_out(Sample([Text("")]), Given(ids), spec)], length) for ids in words]


def micro_batches(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    from ernie5.sequence.packing import collate

    size = len(rows) // count
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def measure(run: Run) -> dict[str, float]:
    """Bytes above a process that trained next to nothing, resident and as Paddle counts them, and seconds of a step."""
    from ernie5.ops import kernels  # before paddle  # isort: skip

    from paddle.base import core

    config, problem = run.config(), kernels.library().problem
    SingleProcess(Config(model=model_preset("tiny"))).step()  # libraries are loaded at their first use
    before = worker.trimmed_bytes()
    trained = SingleProcess(config)
    trained.step()  # the optimizer's state is there from the second step on
    worker.trimmed_bytes()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        trained.step()
        seconds.append(time.perf_counter() - start)
    peak = worker.status_bytes("VmHWM") - before
    allocated = core.host_memory_stat_peak_value("Allocated", 0)
    return {"peak": peak, "allocated": allocated, "seconds": min(seconds), "missing_kernels": problem}


# ---------------------------------------------------------------------- all processes


def launch(run: Run, threads: int) -> dict[str, float]:
    """Starts the processes of a run, which share ``threads``; returns the largest of what they measured.

    ``RuntimeError`` with the last words of one that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--measure", json.dumps(asdict(run)), f"{folder}/{rank}.json"],
                env={**os.environ, **GIVE_BACK, "OMP_NUM_THREADS": str(max(1, threads // run.processes))},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(run.processes)
        ]
        try:
            for process in processes:
                try:
                    _, words = process.communicate(timeout=TIME_LIMIT)
                except subprocess.TimeoutExpired:
                    raise RuntimeError(f"not done within {TIME_LIMIT} s") from None
                if process.returncode:
                    raise RuntimeError(words.strip().splitlines()[-1] if words.strip() else "it left no message")
        finally:
            for process in processes:
                process.kill()
        found = [json.loads(Path(f"{folder}/{rank}.json").read_text(encoding="utf-8")) for rank in range(run.processes)]
    return {key: max(values[key] for values in found) for key in found[0]}


def report_memory(report: common.Report, found: dict[str, dict[str, float]], plans: dict[str, Plan]) -> None:
    rows, errors = [], []
    for name, values in found.items():
        predicted = plans[name].fullest.memory.total
        errors.append(abs(predicted / values["peak"] - 1))
        counted = predicted / values["allocated"] - 1
        megabytes = [size / 2**20 for size in (predicted, values["peak"], values["allocated"])]
        rows.append([name, *(f"{size:,.0f}" for size in megabytes), f"{errors[-1]:.1%}", f"{counted:+.1%}"])
    report.table(
        "Memory of the fullest process", ["run", "predicted MB", "held", "in tensors", "error", "of tensors"], rows
    )
    report.figure("memory_error_max", max(errors))
    report.figure("memory_runs", len(errors))


def report_time(report: common.Report, found: dict[str, dict[str, float]], plans: dict[str, Plan]) -> None:
    """``step_time_order``: share of the pairs with clearly different times that the plan orders alike."""
    measured = {name: values["seconds"] for name, values in found.items()}
    predicted = {name: plans[name].time.total for name in found}
    rows = [[n, f"{predicted[n]:.3f}", f"{measured[n]:.3f}", f"{predicted[n] / measured[n]:.2f}"] for n in found]
    report.table("Seconds of a step", ["run", "predicted", "measured", "ratio"], rows)
    pairs = [(a, b) for a, b in combinations(found, 2) if not 1 / CLEAR < measured[a] / measured[b] < CLEAR]
    right = sum((measured[a] < measured[b]) == (predicted[a] < predicted[b]) for a, b in pairs)
    if pairs:
        report.figure("step_time_order", right / len(pairs))


def main() -> int:
    if len(sys.argv) == 4 and sys.argv[1] == "--measure":
        Path(sys.argv[3]).write_text(json.dumps(measure(Run(**json.loads(sys.argv[2])))), encoding="utf-8")
        return 0
    parser = common.argument_parser(__doc__, rounds=1)
    options = parser.parse_args()
    report, found, failed = common.Report("Plan against measurement", options), {}, {}
    runs = [run for run in RUNS if not options.only or any(word in run.name for word in options.only)]
    for run in runs:
        common.progress(run.name)
        try:
            found[run.name] = launch(run, options.threads)
        except RuntimeError as error:
            failed[run.name] = str(error)
    missing = {name: values.pop("missing_kernels") for name, values in found.items() if values["missing_kernels"]}
    report.failures(failed | {f"kernels of {name}: references run instead": why for name, why in missing.items()})
    if not found:
        return 1
    plans = {run.name: run.plan() for run in runs}
    report_memory(report, found, plans)
    report_time(report, found, plans)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
