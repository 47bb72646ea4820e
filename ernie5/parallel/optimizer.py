"""ZeRO on Fleet's sharding optimizer, and the norm of gradients that lie on many ranks."""

from __future__ import annotations

from collections import defaultdict

import paddle
import paddle.distributed as dist
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer.dygraph_sharding_optimizer import (
    DygraphShardingOptimizer,
)

from ernie5.ops.adamw import global_norm
from ernie5.parallel.gradients import Gradients
from ernie5.parallel.plan import TIED_AUDIO, TIED_TEXT
from ernie5.parallel.topology import Topology

Pairs = list[tuple[paddle.Tensor, paddle.Tensor]]


class ShardedOptimizer(DygraphShardingOptimizer):
    """Each sharding rank keeps the state of some parameters, updates these and sends them to the others.

    Around any optimizer of Paddle's. Parameters that the sharding ranks do not have in common, experts that lie across
    them, stay with their rank. Shared weights have the same owner on every stage.
    """

    def __init__(self, optimizer: paddle.optimizer.Optimizer, gradients: Gradients, topology: Topology) -> None:
        self.gradients, self.topology = gradients, topology
        super().__init__(optimizer, topology.hcg)
        gradients.own(self.owner_of)

    def _partition_parameters(self) -> dict[int, list[paddle.Tensor]]:
        ranks, group = self.topology.config.sharding, self.topology.sharding
        names = {parameter.name: name for name, parameter in self.gradients.parameters.items()}
        mapping: dict[int, list[paddle.Tensor]] = {rank: [] for rank in range(ranks)}
        self.owner_of, sizes = {}, [0] * ranks
        ordered = sorted(self._parameter_list, key=lambda p: p.size, reverse=True)
        ordered.sort(key=lambda p: names[p.name] not in (TIED_TEXT, TIED_AUDIO))
        for parameter in ordered:
            name = names[parameter.name]
            if not self.gradients.placements[name].shardable:
                mapping[group.rank].append(parameter)
                continue
            owner = {TIED_TEXT: 0, TIED_AUDIO: 1 % ranks}.get(name, sizes.index(min(sizes)))
            mapping[owner].append(parameter)
            sizes[owner] += parameter.size
            self.owner_of[name] = owner
        return mapping

    @paddle.no_grad()
    def step(self) -> None:
        mine = self._rank2params[self._sharding_rank]
        pairs = [(p, p.grad) for p in mine if p.grad is not None]
        self._inner_opt._apply_optimize(None, None, pairs)
        self._sharding_sync_parameters()

    def _sharding_sync_parameters(self) -> None:
        group = self.topology.sharding
        for name, owner in self.owner_of.items():
            dist.broadcast(self.gradients.parameters[name], src=group.ranks[owner], group=group)


def measure_norm(gradients: Gradients, topology: Topology, pairs: Pairs) -> float:
    """The 2-norm of all gradients of the run, of which ``pairs`` are this rank's; every rank calls it."""
    names = {parameter.name: name for name, parameter in gradients.parameters.items()}
    by_share: dict[float, list[paddle.Tensor]] = defaultdict(list)
    for parameter, gradient in pairs:
        by_share[gradients.squared_share(names[parameter.name])].append(gradient)
    total = sum(share * global_norm(grads) ** 2 for share, grads in by_share.items())
    return float(topology.sum_over_world(paddle.to_tensor([total], "float64"))) ** 0.5
