"""``Worker``: one process of a run. It holds its part of the model and does its part of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from ernie5.checkpoint import Part, Processes
from ernie5.config.schema import ParallelConfig
from ernie5.model import Ernie5Config, Ernie5ForCausalLM
from ernie5.model.losses import TERMS, total_weights
from ernie5.parallel.batch import Batch, local_part, to_tensors
from ernie5.parallel.build import local_model
from ernie5.parallel.gradients import Gradients
from ernie5.parallel.optimizer import ShardedOptimizer, measure_norm
from ernie5.parallel.pipeline import Pipeline
from ernie5.parallel.plan import join, kind_of, part_of
from ernie5.parallel.topology import Topology


class Worker:
    """``model`` is this rank's part, under the names of the whole; ``topology`` says where it stands."""

    def __init__(self, config: Ernie5Config, parallel: ParallelConfig, seed: int = 0, bf16: bool = False) -> None:
        self.topology = Topology(parallel, config.num_layers, config.audio_levels)
        self.model, self.placements = local_model(config, self.topology, seed)
        if bf16:
            self.model.to_bfloat16()
        with paddle.LazyGuard():
            whole = Ernie5ForCausalLM(config)
        names = [name for name, _ in whole.named_parameters()]
        self.shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
        self.processes = Processes(self.topology.rank, self.topology.layout.ranks, _gather)
        self.gradients = Gradients(self.model, self.placements, names, self.topology)
        self.pipeline = Pipeline(self.model, self.topology, self.gradients.collect) if parallel.pipeline > 1 else None
        self.dtype = paddle.get_default_dtype()

    def part_of(self, name: str) -> Part:
        """What is here of a parameter or buffer of the whole model, whose shapes are ``shapes``."""
        if name not in self.placements:
            return Part(self.shapes[name])  # a buffer
        where = self.placements[name]
        return part_of(where.kind, self.shapes[name], where.part, where.parts)

    @property
    def row_rank(self) -> int:
        """Which share of the rows this rank reads, out of ``row_ranks``."""
        return self.topology.layout.row_of(self.topology.rank)

    @property
    def row_ranks(self) -> int:
        return self.topology.layout.rows

    def optimizer(self, optimizer: paddle.optimizer.Optimizer) -> paddle.optimizer.Optimizer | ShardedOptimizer:
        """What to step in place of ``optimizer``, which was built for the parameters of ``model``.

        Its clip, if it has a ``measure``, sees the norm of the whole run.
        """
        clip = optimizer._grad_clip
        if hasattr(clip, "measure"):
            clip.measure = partial(measure_norm, self.gradients, self.topology)
        if self.topology.sharding is None:
            return optimizer
        return ShardedOptimizer(optimizer, self.model, self.gradients, self.topology)

    def total_weights(self, batches: Sequence[Batch]) -> dict[str, float]:
        """What the losses of a step are divided by; ``batches`` are the micro-batches of this rank's rows."""
        place = self.topology.place
        counts = place.pipeline == place.context == place.tensor == 0
        own = total_weights(batches, self.model.config.mtp_depth > 0) if counts else {}
        values = [own.get(name, 0.0) for name in TERMS]
        summed = self.topology.sum_over_world(paddle.to_tensor(values, "float64")).tolist()
        return {name: value for name, value in zip(TERMS, summed, strict=True) if value > 0}

    def forward_backward(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Forward and backward of a step's micro-batches, this rank's rows whole; gradients are ready for the step.

        Returns the losses of the step: each term's, and ``loss``, their weighted sum; and ``tokens``, not padding.
        """
        total = self.total_weights(batches)
        divisors = {name: total.get(name, 1.0) for name in TERMS}
        parts = [to_tensors(local_part(batch, self.topology), self.dtype) for batch in batches]
        if self.pipeline is not None:
            sums = self.pipeline.forward_backward(parts, divisors)
        else:
            sums = self._one_after_another(parts, divisors)
        self.gradients.finish()
        return self._report(sums, total, batches)

    def _one_after_another(
        self, parts: Sequence[Mapping[str, paddle.Tensor]], divisors: Mapping[str, float]
    ) -> dict[str, paddle.Tensor]:
        sums: dict[str, paddle.Tensor] = {}
        for part in parts:
            outputs = self.model(total=divisors, **part)
            outputs["loss"].backward()
            for name, value in outputs["losses"].items():
                value = value.detach() * divisors[name]
                sums[name] = sums[name] + value if name in sums else value
            self.gradients.collect()
        return sums

    def _report(
        self, sums: Mapping[str, paddle.Tensor], total: Mapping[str, float], batches: Sequence[Batch]
    ) -> dict[str, float]:
        place = self.topology.place
        reads = place.pipeline == place.context == place.tensor == 0
        tokens = sum(int(np.count_nonzero(batch["input_ids"])) for batch in batches) if reads else 0
        values = [float(sums[name]) if name in sums else 0.0 for name in TERMS] + [float(tokens)]
        *values, tokens = self.topology.sum_over_world(paddle.to_tensor(values, "float64")).tolist()
        losses = {name: value / total[name] for name, value in zip(TERMS, values, strict=True) if name in total}
        weights = self.model.loss_weights.weights()
        loss = sum(weights[name] * value for name, value in losses.items())
        return {"loss": loss, **losses, "tokens": tokens}

    def finish_step(self, losses: Mapping[str, float], router_bias_speed: float) -> None:
        """After the update: observes the step's losses and balances the routers from the counts of all ranks."""
        self.model.loss_weights.observe(losses)
        self.sum_router_counts()
        self.model.update_router_bias(router_bias_speed)

    def sum_router_counts(self) -> None:
        """Every rank of a stage has the counts of all."""
        for router in self.model.routers():
            if self.topology.stage is not None:
                dist.all_reduce(router.counts, group=self.topology.stage)

    def whole_load(self, load: np.ndarray) -> np.ndarray:
        """int64 [R,E] of this stage's routers -> that of all stages', bottom to top; every rank calls it."""
        config, topology = self.model.config, self.topology
        if topology.config.pipeline == 1:
            return load
        whole = np.zeros([config.num_layers + bool(config.mtp_depth), load.shape[1]], load.dtype)
        if topology.layout.flat(topology.rank) == 0:
            here = sorted(block for piece in topology.blocks() for block in piece)
            whole[here + [config.num_layers] * (self.model.mtp is not None)] = load
        return topology.sum_over_world(paddle.to_tensor(whole)).numpy()

    def gather_whole(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """Parts by name on every rank -> whole arrays on rank 0; None elsewhere. Buffers are whole everywhere."""
        part_of = {name: where.part for name, where in self.placements.items()}
        mine = {name: (part_of.get(name, 0), value) for name, value in values.items()}
        gathered = self.processes.gather(mine)
        if self.topology.rank:
            return None
        parts: dict[str, dict[int, np.ndarray]] = {}
        for rank in gathered:
            for name, (part, value) in rank.items():
                parts.setdefault(name, {}).setdefault(part, value)
        return {name: join(kind_of(name), [by[i] for i in sorted(by)]) for name, by in parts.items()}


def _gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    gathered: list[Any] = []
    dist.all_gather_object(gathered, value)
    return gathered
