"""Gradients of one optimiser step, added up over the ranks that saw other tokens, each parameter over its own group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.distributed.communication.group import Group
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients_with_group

from ernie5.parallel.plan import Placement
from ernie5.parallel.topology import Topology

BUCKET = 128 << 20  # bytes that travel together


class Gradients:
    """Sums for the parameters of ``model``; losses are sums too, so nothing is averaged.

    ``all_names``: the parameters of the whole model, in one order on every rank. A parameter that no rank used has no
    gradient anywhere, so that it is not updated, as in one process.
    """

    def __init__(
        self, model: nn.Layer, placements: dict[str, Placement], all_names: list[str], topology: Topology
    ) -> None:
        self.topology, self.all_names = topology, all_names
        self.parameters = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
        self.placements = placements
        self.owner_of: dict[str, int] = {}  # parameter -> its owner among the sharding ranks

    def own(self, owner_of: dict[str, int]) -> None:
        """Leaves the sum of each of these with its owner alone."""
        self.owner_of = owner_of

    def collect(self) -> None:
        """Sums this micro-batch's gradients onto their owners, and frees them elsewhere (ZeRO stage 2)."""
        self._materialise(self._used())
        self._to_owners()

    def finish(self, collected: bool = False) -> None:
        """Every rank that steps a parameter has the sum of its gradients over the run.

        ``collected``: every micro-batch's gradients are with their owners already.
        """
        if not collected:
            self._materialise(self._used())
            self._to_owners()
        for group, parameters in self._by_group():
            fused_allreduce_gradients_with_group(parameters, group, BUCKET, scale=1.0)

    def squared_share(self, name: str) -> float:
        """How much of the squared norm of its gradient this rank has to count, so that the run counts it once."""
        copies = self.placements[name].copies
        if name in self.owner_of:
            copies //= self.topology.config.sharding
        return 1.0 / copies

    def _used(self) -> set[str]:
        """Names of the parameters that have a gradient on any rank."""
        flags = np.array([self._has(name) for name in self.all_names], np.int32)
        used = paddle.to_tensor(flags)
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        return {name for name, flag in zip(self.all_names, used.tolist(), strict=True) if flag}

    def _has(self, name: str) -> bool:
        return name in self.parameters and self.parameters[name].grad is not None

    def _materialise(self, used: set[str]) -> None:
        for name, parameter in self.parameters.items():
            if name in used and parameter.grad is None:
                parameter.grad = paddle.zeros_like(parameter)

    def _to_owners(self) -> None:
        group = self.topology.sharding
        if group is None:
            return
        for name, owner in self.owner_of.items():
            parameter = self.parameters[name]
            if parameter.grad is None:
                continue
            dist.reduce(parameter.grad, dst=group.ranks[owner], group=group)
            if owner != group.rank:
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
