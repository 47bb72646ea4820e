"""The runs that ``plan_accuracy.py`` measures, and what one of their processes does.

python -m benchmarks.plan_runs RUN OUT     # in each process: RUN is a ``Run`` as JSON or "link", OUT a folder
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ernie5.config import Config, ModelConfig, ParallelConfig, TrainerConfig, model_preset
from ernie5.planning import Plan, load_machine, make_plan

STEPS, WARM_UP = 5, 2
LINK = "link"  # in place of a run: two processes that do nothing but talk
LINK_BYTES = 16 << 20
LINK_PRODUCT, LINK_PRODUCTS = 512, 2  # size and number of what the two compute between messages: some 3 ms
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
    bf16: bool = False

    def config(self) -> Config:
        model = replace(model_preset(self.preset), **SMALLER[self.preset], **self.model)
        trainer = TrainerConfig(rows_per_step=self.rows, gradient_accumulation=self.accumulation, bf16=self.bf16)
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
    Run("nano, 32 rows, bfloat16", "nano", 32, bf16=True),
    Run("mini, 4 rows, bfloat16", "mini", 4, bf16=True),
    Run("nano, dp2, 8 rows", "nano", 8, processes=2),
    Run("nano, tp2, 16 rows", "nano", 16, parallel={"tensor": 2}, processes=2),
    Run("nano, pp2, 4 x 8 rows", "nano", 8, 4, parallel={"pipeline": 2}, processes=2),
    Run("nano, ep2, 8 rows", "nano", 8, parallel={"expert": 2}, processes=2),
    Run("nano, zero1 x 2, 8 rows", "nano", 8, parallel={"sharding": 2}, processes=2),
    Run("nano, zero1 x 2, 8 rows, bfloat16", "nano", 8, parallel={"sharding": 2}, processes=2, bf16=True),
    Run("nano, cp2, 16 rows", "nano", 16, parallel={"context": 2}, processes=2),
    Run("nano, tp2.pp2, 4 x 8 rows", "nano", 8, 4, parallel={"tensor": 2, "pipeline": 2}, processes=4),
    Run("mini, tp2, 4 rows", "mini", 4, parallel={"tensor": 2}, processes=2),
    Run("mini, pp2, 4 x 1 rows", "mini", 1, 4, parallel={"pipeline": 2}, processes=2),
    Run("mini, ep2, 2 rows", "mini", 2, parallel={"expert": 2}, processes=2),
    Run("mini, zero1 x 2, 2 rows", "mini", 2, parallel={"sharding": 2}, processes=2),
    Run("mini, ep2.tp2, 2 rows", "mini", 2, parallel={"expert": 2, "tensor": 2}, processes=4),
)


class SingleProcess:
    """One process that trains the whole model: forward and backward of every micro-batch, then AdamW."""

    stage = 0

    def __init__(self, config: Config) -> None:
        from ernie5.model import Ernie5Config, Ernie5ForCausalLM

        self.count = config.trainer.gradient_accumulation
        self.model = Ernie5ForCausalLM(Ernie5Config.from_model_config(config.model))
        if config.trainer.bf16:
            self.model.to_bfloat16()
        self.model.train()
        self.optimizer = optimizer_of(self.model)
        self.rows = packed_rows(config.model, config.trainer.rows_per_step * self.count, [0])

    def step(self) -> None:
        import paddle

        for part in micro_batches(self.rows, self.count):
            batch = {name: paddle.to_tensor(values) for name, values in part.items()}
            (self.model(**batch)["loss"] / self.count).backward()
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)


class OneOfSeveral:
    """One process of a layout, as the trainer runs it."""

    def __init__(self, config: Config) -> None:
        from ernie5.model import Ernie5Config
        from ernie5.parallel.worker import Worker

        self.worker = Worker(Ernie5Config.from_model_config(config.model), config.parallel, bf16=config.trainer.bf16)
        self.model = self.worker.model
        self.model.train()
        self.optimizer = self.worker.optimizer(optimizer_of(self.model))
        self.stage, self.count = self.worker.topology.place.pipeline, config.trainer.gradient_accumulation
        count = config.trainer.rows_per_step * self.count
        first = self.worker.row_rank * count
        self.rows = packed_rows(config.model, count * self.worker.row_ranks, [first])[first : first + count]

    def step(self) -> None:
        losses = self.worker.forward_backward(micro_batches(self.rows, self.count))
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)
        self.worker.finish_step(losses, 1e-3)


def optimizer_of(model: Any) -> Any:
    import paddle

    from ernie5.trainer.optimizer import GuardedClip, build_optimizer

    rate, clip = paddle.optimizer.lr.StepDecay(1e-4, 1000), GuardedClip(1.0, lambda norm: None)
    return build_optimizer(model, rate, (0.9, 0.95), 1e-8, 0.1, clip)


def packed_rows(model: ModelConfig, count: int, mixed: Sequence[int] = ()) -> list[dict[str, Any]]:
    """``count`` rows, each filled by a document of random words; those of the numbers ``mixed`` begin with one short
    document of every other modality, so that every parameter has a gradient.
    """
    import numpy as np

    from benchmarks.train_step import Given
    from ernie5.model import Ernie5Config
    from ernie5.sequence.layout import lay_out
    from ernie5.sequence.packing import pack
    from ernie5.sequence.parts import Sample, Text
    from ernie5.sequence.spec import LayoutSpec

    spec = LayoutSpec.of_model(Ernie5Config.from_model_config(model), (1, 2), [model.vision_bits])
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        samples = other_modalities(model, rng) if i in mixed else []
        documents = [lay_out(sample, Given(np.arange(16, 18)), spec) for sample in samples]
        left = model.max_sequence_length - sum(map(len, documents)) - 2
        words = Given(rng.integers(16, model.vocab_size, left))
        rows.append(pack([*documents, lay_out(Sample([Text("")]), words, spec)], model.max_sequence_length))
    return rows


def other_modalities(model: ModelConfig, rng: Any) -> list[Any]:
    """A picture drawn, one seen, and speech in a given voice: all that a parameter may wait for."""
    from ernie5.sequence.parts import AudioCodes, Sample, SpeakerEmbedding, Text, VisionFeatures, VisionLatent

    drawn = VisionLatent({model.vision_bits: rng.standard_normal((1, 2, 2, model.vision_bits))}, video=False)
    cnn, vit = (rng.standard_normal((4, 4, width)) for width in (model.vision_cnn_dim, model.vision_vit_dim))
    seen = VisionFeatures(cnn, vit, (1, 2, 2), video=False)
    said = AudioCodes(rng.integers(0, model.audio_codebook_size, (2, model.audio_levels)), True)
    voice = SpeakerEmbedding(rng.standard_normal(model.speaker_dim))
    return [Sample([Text(""), drawn]), Sample([seen, Text("")]), Sample([Text(""), voice, said])]


def micro_batches(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    from ernie5.sequence.packing import collate

    size = len(rows) // count
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def fill_blas() -> None:
    """A product and its gradients at a size from which MKL's own scratch memory, some 10 MB a thread, grows no more."""
    import paddle

    x, weight = paddle.ones([2048, 1024]), paddle.ones([1024, 2048])
    x.stop_gradient = weight.stop_gradient = False
    paddle.matmul(x, weight).sum().backward()
    paddle.matmul(x, weight.T.contiguous(), transpose_y=True).sum().backward()


def measure(run: Run) -> dict[str, Any]:
    """What this process of ``run`` takes: bytes above one that trained next to nothing, resident (``peak``) and as
    Paddle counts them (``allocated``), its ``stage``, and ``seconds`` of a step.

    The process starts with an allocator that gives freed blocks back, so that what is resident is in use; for the time
    it keeps them, as training does.
    """
    from ernie5 import environment
    from ernie5.ops import kernels  # before paddle  # isort: skip

    from paddle.base import core

    from benchmarks import worker

    config, problem = run.config(), kernels.library().problem
    kind = SingleProcess if run.processes == 1 else OneOfSeveral
    layers = 2 * config.parallel.pipeline * config.parallel.virtual_stages
    small = replace(config, model=replace(model_preset("tiny"), num_layers=layers))
    kind(small).step()  # libraries are loaded and links made at their first use
    fill_blas()
    before = worker.trimmed_bytes()
    trained = kind(config)
    trained.step()  # the optimizer's state is there from the second step on
    worker.trimmed_bytes()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    trained.step()
    trained.step()
    found = {"peak": worker.status_bytes("VmHWM") - before, "stage": trained.stage, "missing_kernels": problem}
    found["parameters"] = sum(parameter.size for parameter in trained.model.parameters())
    found["allocated"] = core.host_memory_stat_peak_value("Allocated", 0)
    del os.environ["ERNIE5_KEEP_ALLOCATOR"]
    environment.prepare()
    return {**found, "seconds": min(_timed(trained) for _ in range(WARM_UP + STEPS))}


def _timed(trained: SingleProcess | OneOfSeveral) -> float:
    start = time.perf_counter()
    trained.step()
    return time.perf_counter() - start


def measure_link() -> dict[str, float]:
    """Bytes a second that a rank sends in an all-reduce among all, and seconds of one of next to nothing (``latency``).

    ``wake_up``: seconds that one takes beyond that where all compute for as long before it.
    """
    import ernie5  # noqa: F401, before paddle  # isort: skip
    import paddle
    import paddle.distributed as dist

    from ernie5.parallel import awake, leaving

    leaving.prepare()
    awake.keep(True)  # as ranks are
    dist.init_parallel_env()
    long, short = paddle.ones([LINK_BYTES // 4]), paddle.ones([1])
    factor = paddle.ones([LINK_PRODUCT, LINK_PRODUCT])

    def compute() -> None:
        for _ in range(LINK_PRODUCTS):
            paddle.matmul(factor, factor)

    def compute_and_sum() -> None:
        compute()
        dist.all_reduce(short)

    latency = _fastest(lambda: dist.all_reduce(short), 100)
    ranks, computing = dist.get_world_size(), _fastest(compute, 50)
    wake_up = max(_fastest(compute_and_sum, 50) - computing - latency, 0.0)
    sent = 2 * LINK_BYTES * (ranks - 1) / ranks
    bandwidth = sent / (_fastest(lambda: dist.all_reduce(long), 5) - latency)
    return {"bandwidth": bandwidth, "latency": latency, "wake_up": wake_up}


def _fastest(call: Callable[[], object], count: int) -> float:
    """Seconds of a call: the mean of ``count``, the best of five such."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            call()
        seconds.append((time.perf_counter() - start) / count)
    return min(seconds)


def main() -> None:
    words, out = sys.argv[1:]
    found = measure_link() if words == LINK else measure(Run(**json.loads(words)))
    rank = os.environ["PADDLE_TRAINER_ID"]
    Path(out, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
