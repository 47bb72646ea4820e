"""ZeRO on Fleet's sharding optimizer, and the norm of gradients that lie on many ranks."""

from __future__ import annotations

from collections import defaultdict

import paddle
import paddle.distributed as dist
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer.dygraph_sharding_optimizer import (
    DygraphShardingOptimizer,
)

from ernie5.model import Ernie5ForCausalLM
from ernie5.ops.adamw import global_norm
from ernie5.parallel.gradients import Gradients
from ernie5.parallel.ownership import share_out
from ernie5.parallel.plan import TIED_AUDIO, TIED_TEXT, Kind
from ernie5.parallel.topology import Topology

Pairs = list[tuple[paddle.Tensor, paddle.Tensor]]


class ShardedOptimizer(DygraphShardingOptimizer):
    """Each rank keeps the state of some parameters, updates these and sends them to the others (``ownership.py``).

    Around any optimizer of Paddle's. Shared weights have the same owner on every stage.
    """

    def __init__(
        self,
        optimizer: paddle.optimizer.Optimizer,
        model: Ernie5ForCausalLM,
        gradients: Gradients,
        topology: Topology,
    ) -> None:
        self.gradients, self.topology = gradients, topology
        self.names = {parameter.name: name for name, parameter in gradients.parameters.items()}
        gradients.own(self._owners(optimizer._parameter_list), model)
        super().__init__(optimizer, topology.hcg)

    def _owners(self, parameters: list[paddle.Tensor]) -> dict[str, int]:
        """Parameter -> its owner's place among the ranks that divide it, for those that are divided."""
        config, placements, layout = self.topology.config, self.gradients.placements, self.topology.layout
        sizes = {self.names[parameter.name]: parameter.size for parameter in parameters}
        spread = {name for name in sizes if placements[name].kind is Kind.EXPERT}
        inner, fixed = config.context * config.tensor, {TIED_TEXT: 0, TIED_AUDIO: 1 % config.sharding}
        shared = share_out(sizes, spread, fixed, layout.stage_ranks, config.sharding, inner, config.expert)
        return {
            name: int(owner[placements[name].part if name in spread else 0])
            for name, owner in shared.owner.items()
            if placements[name].shards is not None
        }

    def _partition_parameters(self) -> dict[int, list[paddle.Tensor]]:
        """Fleet's table, by place along the sharding axis. An expert is in its owner's own alone."""
        mapping: dict[int, list[paddle.Tensor]] = {rank: [] for rank in range(self.topology.config.sharding)}
        for parameter in self._parameter_list:
            name = self.names[parameter.name]
            if self.gradients.is_mine(name):
                mapping[self.topology.sharding.rank].append(parameter)
            elif self.gradients.placements[name].kind is not Kind.EXPERT:
                mapping[self.gradients.owner_of[name]].append(parameter)
        return mapping

    @paddle.no_grad()
    def step(self) -> None:
        mine = self._rank2params[self._sharding_rank]
        pairs = [(p, p.grad) for p in mine if p.grad is not None]
        self._inner_opt._apply_optimize(None, None, pairs)
        self._sharding_sync_parameters()

    def _sharding_sync_parameters(self) -> None:
        for name, owner in self.gradients.owner_of.items():
            group = self.gradients.placements[name].shards
            dist.broadcast(self.gradients.parameters[name], src=group.ranks[owner], group=group)


def measure_norm(gradients: Gradients, topology: Topology, pairs: Pairs) -> float:
    """The 2-norm of all gradients of the run, of which ``pairs`` are this rank's; every rank calls it."""
    names = {parameter.name: name for name, parameter in gradients.parameters.items()}
    by_share: dict[float, list[paddle.Tensor]] = defaultdict(list)
    for parameter, gradient in pairs:
        by_share[gradients.squared_share(names[parameter.name])].append(gradient)
    total = sum(share * global_norm(grads) ** 2 for share, grads in by_share.items())
    return float(topology.sum_over_world(paddle.to_tensor([total], "float64"))) ** 0.5
