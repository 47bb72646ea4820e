"""``Topology``: this process among the others; Fleet's hybrid groups, and those of experts and shared weights."""

from __future__ import annotations

import logging
import os
import time
import warnings

import paddle
import paddle.distributed as dist
from paddle.base import core
from paddle.distributed import fleet
from paddle.distributed.communication.group import Group

from ernie5.config.schema import ParallelConfig
from ernie5.parallel import awake, calls, leaving, watchdog
from ernie5.parallel.blame import Wait
from ernie5.parallel.layout import Layout, world_size
from ernie5.parallel.watchdog import Watchdog

GLOO = "gloo"


class Topology:
    """Starts the groups of ``config`` among the processes of this run; make one, on every process.

    A group of one rank is None: there is nobody to talk to.
    """

    def __init__(self, config: ParallelConfig, num_layers: int, audio_levels: int) -> None:
        self.config, self.layout = config, Layout(config, world_size())
        self.watchdog = _start_watchdog(config.timeout_seconds) if self.layout.ranks > 1 else None
        self.hcg = _start_fleet(config, self.layout)
        self.rank = dist.get_rank()
        self.place = self.layout.coordinates[self.rank]
        self.gloo = dist.get_backend() == "GLOO"
        self._groups: dict[tuple[int, ...], Group] = {}
        stages = config.pipeline
        self.num_layers = num_layers
        layout = self.layout
        self.stage = self._group_of(layout.stages())
        self.tensor = self._group_of(layout.along("tensor"))
        self.context = self._group_of(layout.along("context"))
        self.sharding = self._group_of(layout.along("sharding"))
        self.split_replicas = self._group_of(layout.along("data", "sharding", "context"))
        self.experts = self._group_of(layout.experts())
        self.expert_replicas = self._group_of(layout.expert_replicas())
        self.owners = self._group_of(layout.along("data", "context", "tensor"))
        self.split_owners = self._group_of(layout.along("data", "context"))
        feedback = {layout.stage_of(b, num_layers) for b in range(num_layers - audio_levels, num_layers - 1)}
        self.text_stages = sorted({0, stages - 1})
        self.audio_stages = sorted({0, *feedback})
        self.tied_text = self._group_of(layout.tied(self.text_stages))
        self.tied_audio = self._group_of(layout.tied(self.audio_stages))

    @property
    def is_first_stage(self) -> bool:
        return self.place.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        return self.place.pipeline == self.config.pipeline - 1

    @property
    def spread(self) -> bool:
        """Whether ranks must call the same layers even where one of them has nothing to do."""
        return max(self.config.tensor, self.config.context, self.config.expert) > 1

    def blocks(self) -> list[list[int]]:
        """The blocks of each piece of the model that is here."""
        return self.layout.blocks(self.place.pipeline, self.num_layers)

    def sum_over_world(self, values: paddle.Tensor) -> paddle.Tensor:
        """Adds up over all processes, in place."""
        dist.all_reduce(values)
        return values

    def _group_of(self, groups: list[list[int]]) -> Group | None:
        """This rank's among ``groups``, all of which come into being, in the same order on every rank."""
        mine = None
        for ranks in groups:
            key = tuple(sorted(ranks))
            if len(key) > 1 and key not in self._groups:
                self._groups[key] = dist.new_group(list(key))
            if self.rank in key and len(key) > 1:
                mine = self._groups[key]
        return mine


def _start_watchdog(seconds: float) -> Watchdog:
    """This process's, which lives as long as the process; before any group, so that it sees those being made."""
    if watchdog.running is None:
        store = core.create_or_get_global_tcp_store()
        rank = int(os.environ["PADDLE_TRAINER_ID"])

        def exchange(address: str | None) -> str:
            if address is not None:
                store.set("ernie5/watchdog", address)
            return store.get("ernie5/watchdog").decode()

        host = os.environ["PADDLE_CURRENT_ENDPOINT"].rsplit(":", 1)[0]
        kind = watchdog.Centre if rank == 0 else watchdog.Member
        made = watchdog.running = kind(rank, world_size(), host, seconds, exchange)
        calls.install()
        recorded = calls.calls
        recorded.on_failure, recorded.returns_at_once = made.broken, not _on_cpu()
        made.counts = recorded.counts
        made.waits = lambda: [
            Wait(c.name, c.key, c.ranks, c.number, time.monotonic() - c.since, _on_cpu()) for c in recorded.waiting()
        ]
        made.start()
    return watchdog.running


def _on_cpu() -> bool:
    return not paddle.is_compiled_with_cuda() or os.environ.get("PADDLE_DISTRI_BACKEND") == GLOO


def _start_fleet(config: ParallelConfig, layout: Layout) -> fleet.base.topology.HybridCommunicateGroup:
    if not paddle.is_compiled_with_cuda():
        os.environ["PADDLE_DISTRI_BACKEND"] = GLOO
    if _on_cpu():
        from ernie5.parallel import gloo

        gloo.install()
        if layout.ranks > 1:
            awake.keep(config.active_wait)
    leaving.prepare()
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {
        "dp_degree": layout.data,
        "mp_degree": config.tensor,
        "pp_degree": config.pipeline,
        "sharding_degree": config.sharding,
        "sep_degree": config.context,
        "pp_configs": {"delay_scale_loss": True, "enable_timer": False},
    }
    with warnings.catch_warnings():  # "not in group", once for each group of others
        warnings.simplefilter("ignore")
        fleet.init(is_collective=True, strategy=strategy, log_level=logging.WARNING)
    hcg = fleet.get_hybrid_communicate_group()
    place = layout.coordinates[dist.get_rank()]
    fleets = (
        hcg.get_data_parallel_rank(),
        hcg.get_stage_id(),
        hcg.get_sharding_parallel_rank(),
        hcg.get_sep_parallel_rank() if config.context > 1 else 0,
        hcg.get_model_parallel_rank(),
    )
    ours = (place.data, place.pipeline, place.sharding, place.context, place.tensor)
    assert fleets == ours, f"Fleet numbers this rank {fleets}, we {ours}"
    return hcg
