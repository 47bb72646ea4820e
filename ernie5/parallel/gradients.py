"""Gradients of one optimiser step, added up over the ranks that saw other tokens, each parameter over its own group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed.communication.group import Group
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients_with_group

from ernie5.model import Ernie5ForCausalLM
from ernie5.model.layers import Block
from ernie5.parallel.plan import Placement
from ernie5.parallel.topology import Topology

BUCKET = 128 << 20  # bytes that travel together


class Gradients:
    """Sums for the parameters of ``model``; losses are sums too, so nothing is averaged.

    ``all_names``: the parameters of the whole model, in one order on every rank. A parameter that no rank used has no
    gradient anywhere, so that it is not updated, as in one process.

    Under ZeRO the sum of a parameter's gradients is with its owner alone: at the end of the step (stage 1), or (stage
    2) of each block as soon as it has run backward and of what lies outside the blocks after every backward pass, so
    that beside its own sums a rank holds gradients of one block at a time.
    """

    def __init__(
        self, model: Ernie5ForCausalLM, placements: Mapping[str, Placement], all_names: list[str], topology: Topology
    ) -> None:
        self.topology, self.all_names = topology, all_names
        self.parameters = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
        self.placements = placements
        self.owner_of: dict[str, int] = {}  # parameter -> its owner's place in ``Placement.shards``
        self.stage_two = topology.sharding is not None and topology.config.sharding_stage == 2
        self.outside: list[str] = []  # parameters of no block that are divided

    def own(self, owner_of: Mapping[str, int], model: Ernie5ForCausalLM) -> None:
        """Leaves the sum of each of these with its owner alone."""
        self.owner_of = dict(owner_of)
        if not self.stage_two:
            return
        self.outside = list(owner_of)
        for i, block in enumerate(model.layers):
            if isinstance(block, Block):
                names = [name for name in owner_of if name.startswith(f"layers.{i}.")]
                self.outside = [name for name in self.outside if name not in names]
                block.register_forward_pre_hook(partial(self._watch, names, model.config.recompute))

    def is_mine(self, name: str) -> bool:
        """Whether this rank updates the parameter."""
        return name not in self.owner_of or self.owner_of[name] == self.placements[name].shards.rank

    def collect(self) -> None:
        """After a backward pass of stage 2: what lies outside the blocks goes to its owners, and is freed elsewhere."""
        if self.outside:
            self._materialise(self._used(self.outside, self.topology.stage))
            self._to_owners(self.outside)

    def finish(self) -> None:
        """Every rank that updates a parameter has the sum of its gradients over the run."""
        used = self._used(self.all_names, None)
        if self.stage_two:
            left = [name for name in self.owner_of if self._has(name) and not self.is_mine(name)]
            assert not left, f"{left[0]} was not sent to its owner"
            used = {name for name in used if name not in self.owner_of or self.is_mine(name)}
        self._materialise(used)
        if not self.stage_two:
            self._to_owners(self.owner_of)
        for group, parameters in self._by_group():
            fused_allreduce_gradients_with_group(parameters, group, BUCKET, scale=1.0)

    def squared_share(self, name: str) -> float:
        """How much of the squared norm of its gradient this rank has to count, so that the run counts it once."""
        where = self.placements[name]
        return (where.shards.nranks if name in self.owner_of else 1) / where.copies

    def _watch(self, names: list[str], recompute: bool, block: Block, inputs: tuple) -> None:
        """Sees to the block's gradients when that of its input is complete: of the call whose graph is kept."""
        again = recompute and paddle.is_grad_enabled()
        if block.training and not again and not inputs[0].stop_gradient:
            inputs[0].register_hook(partial(self._block_is_done, names))

    def _block_is_done(self, names: list[str], _: paddle.Tensor) -> None:
        self._materialise(names)
        self._to_owners(names)

    def _used(self, names: list[str], group: Group | None) -> set[str]:
        """Those of ``names`` that have a gradient on any rank of ``group``, None: of the run."""
        used = paddle.to_tensor(np.array([self._has(name) for name in names], np.int32))
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
        return {name for name, flag in zip(names, used.tolist(), strict=True) if flag}

    def _has(self, name: str) -> bool:
        return name in self.parameters and self.parameters[name].grad is not None

    def _materialise(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.parameters and self.parameters[name].grad is None:
                self.parameters[name].grad = paddle.zeros_like(self.parameters[name])

    def _to_owners(self, names: Iterable[str]) -> None:
        """Sums over the ranks that divide a parameter onto its owner; the others' gradients are freed."""
        for name in names:
            parameter, group = self.parameters[name], self.placements[name].shards
            if parameter.grad is None:
                continue
            dist.reduce(parameter.grad, dst=group.ranks[self.owner_of[name]], group=group)
            if not self.is_mine(name):
                parameter.clear_gradient(False)

    def _by_group(self) -> Iterator[tuple[Group, list[paddle.Tensor]]]:
        """Groups with the parameters to be summed over them; shared weights of other stages last."""
        for tied in (False, True):
            groups: dict[int, tuple[Group, list[paddle.Tensor]]] = defaultdict(lambda: (None, []))
            for name, parameter in self.parameters.items():
                where = self.placements[name]
                group = where.tied if tied else where.owners if name in self.owner_of else where.replicas
                if group is not None and parameter.grad is not None:
                    groups[group.id] = group, [*groups[group.id][1], parameter]
            yield from groups.values()
