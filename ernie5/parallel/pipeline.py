"""The pipeline: Fleet's schedules over the blocks of the one model, each rank with those of its stage.

A stage hands on the hidden states and the audio losses gathered so far; whatever else a block reads belongs to the
micro-batch, which every stage has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import paddle
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import PipelineLayer
from paddle.distributed.fleet.meta_parallel.pipeline_parallel import (
    PipelineParallel,
    PipelineParallelMicroStepLocations,
    PipelineParallelWithInterleave,
)

from ernie5.model.losses import TERMS
from ernie5.model.modeling import Ernie5ForCausalLM, MicroBatch
from ernie5.parallel.topology import Topology

Carried = tuple[paddle.Tensor, paddle.Tensor]  # hidden states, audio losses [1]


class Pipeline:
    """Runs the micro-batches of a step through ``model``, of which this rank has its stage's layers.

    ``after_backward`` is called behind every backward pass of a micro-batch through a piece of the model.
    """

    def __init__(
        self, model: Ernie5ForCausalLM, topology: Topology, after_backward: Callable[[], None] = lambda: None
    ) -> None:
        self.model, self.topology = model, topology
        self.batches: Sequence[Mapping[str, paddle.Tensor]] = []
        self.total: Mapping[str, float] = {}
        self.sums: dict[str, paddle.Tensor] = {}
        virtual = topology.config.virtual_stages
        layers = PipelineLayer(
            [self._embed, *(_named_block(self, i) for i in range(len(model.layers))), self._heads],
            topology=topology.hcg.topology(),
            loss_fn=lambda loss, _: loss,
            seg_method="layer:block",
            num_virtual_pipeline_stages=virtual if virtual > 1 else None,
        )
        kind = _Interleaved if virtual > 1 else _OneForwardOneBackward
        strategy = fleet.fleet._user_defined_strategy
        strategy.pipeline_configs = {"accumulate_steps": 2 * topology.config.pipeline, "micro_batch_size": 1}
        self.schedule = kind(layers, topology.hcg, strategy)
        self.schedule.register_hook(PipelineParallelMicroStepLocations.BACKWARD_END, lambda **_: after_backward())
        if topology.gloo:
            from ernie5.parallel.gloo import Neighbours

            self.schedule._p2p_helper = Neighbours(topology.layout.along("pipeline"), topology.rank)

    def forward_backward(
        self, batches: Sequence[Mapping[str, paddle.Tensor]], total: Mapping[str, float]
    ) -> dict[str, paddle.Tensor]:
        """Gradients of all micro-batches; on the last stage, the sum of each term's weighted losses."""
        self.batches, self.total = batches, total
        self.open: dict[int, MicroBatch] = {}
        self.passed: dict[int | str, int] = defaultdict(int)
        self.sums = {}
        self.schedule.accumulate_steps = len(batches)
        self.schedule._layers.train()
        self.schedule._init_user_hooks()
        self.schedule.set_virtual_pipeline_rank(0)
        self.schedule.forward_backward_pipeline(_Numbers(len(batches)), None)
        return self.sums

    # ------------------------------------------------------------------ what the layers of Fleet's pipeline are

    def _next(self, layer: int | str) -> MicroBatch:
        """The micro-batch of this call of ``layer``: each sees them in order."""
        number = self.passed[layer]
        self.passed[layer] += 1
        if number not in self.open:
            self.open[number] = self.model.open(self.batches[number])
        return self.open[number]

    def _embed(self, _: paddle.Tensor) -> Carried:
        micro = self._next("embed")
        hidden = self.model.embed(micro.batch)
        first = hidden.flatten()[:1]
        wide = first.astype("float32") if first.dtype == paddle.bfloat16 else first
        return hidden, wide * 0.0  # a sum without a term, but with a gradient

    def _block(self, i: int, carried: Carried) -> Carried:
        micro, sums = self._next(i), {}
        hidden = self.model.run_block(i, carried[0], micro, sums)
        audio = carried[1] + sums["audio"] if "audio" in sums else carried[1] * 1.0
        return hidden, audio

    def _heads(self, carried: Carried) -> paddle.Tensor:
        micro, sums = self._next("heads"), {}
        hidden, audio = carried
        self.model.add_head_losses(hidden, micro, sums)
        sums["audio"] = audio.sum()
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach()
        return self.model.loss_weights({name: sums[name] / self.total[name] for name in TERMS if name in sums})


class _Numbers:
    """Stands for the data where Fleet expects it: every stage reads the micro-batches itself."""

    def __init__(self, count: int) -> None:
        self.left = count * 2  # a rank may be first and last stage

    def __next__(self) -> tuple[paddle.Tensor, paddle.Tensor]:
        assert self.left > 0
        self.left -= 1
        nothing = paddle.zeros([1])
        return nothing, nothing


class _OneForwardOneBackward(PipelineParallel):
    def _broadcast_final_loss(self, return_micro_batch_loss: bool = False) -> None:
        """The losses are summed over the run elsewhere; Fleet's broadcast knows no float64."""


class _Interleaved(PipelineParallelWithInterleave):
    def _check_sanity(self) -> None:
        """Fleet asks for three stages because it would mix up its messages between two; ours go by direction."""

    def _broadcast_final_loss(self, return_micro_batch_loss: bool = False) -> None:
        """As above."""


def _named_block(pipeline: Pipeline, i: int) -> object:
    """Fleet divides the stages by the names of the functions."""

    def block(carried: Carried) -> Carried:
        return pipeline._block(i, carried)

    return block
