"""Bytes that a rank sends in one step, by kind, and the seconds they take on the link their group lies on.

Collectives are counted as rings: of B bytes over n ranks each sends B (n-1) / n to gather or to reduce-scatter, twice
that to all-reduce. A group whose ranks lie in one node uses its links, any other the network.

L tokens a rank holds between attentions, D hidden, K experts a token, w bytes of an activation.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie5.config import Config
from ernie5.planning.layout import Layout, micro_batches, ranks_of_a_token
from ernie5.planning.machine import Machine
from ernie5.planning.shards import (
    held_by_stage,
    owned_by_stage,
    replicated_in_tensor_group,
    stage_shapes,
    tied_parameters,
)

HIDDEN = {
    "local": 0.0,
    "all_to_all": 0.0,
    "all_to_all_overlapped": 0.8,
    "deepep": 0.8,
}  # assumed, behind expert compute
NODE, NETWORK = "node", "network"
COPY = 3  # passes through memory: read, written, and the written line fetched before
# Of the rows that leave, there and back: picked by rank, own ones copied twice, joined, picked by token, added.
DISPATCH_PASSES = 16
# In a forward and a backward pass of one block: numbers of rows, experts, weights, rows there and back; then gradients
# of rows there and back, and of weights.
DISPATCH_MESSAGES = 5 + 3
CONTEXT_MESSAGES = 2 + 2  # of keys and of values


@dataclass(frozen=True)
class Traffic:
    """One kind of message of one rank."""

    kind: str
    what: str
    link: str  # node | network
    sent: float  # bytes in a step
    seconds: float  # in a step, all of it
    exposed: float  # in a step, what computation does not hide
    each_micro_batch: bool  # repeated in every micro-batch, or once a step


class StageTraffic:
    """What the ranks of one stage send."""

    def __init__(self, config: Config, layout: Layout, machine: Machine, stage: int) -> None:
        self.model, self.layout, self.machine, self.stage = config.model, layout, machine, stage
        self.micro_batches = micro_batches(config.trainer)
        tokens = config.trainer.rows_per_step * config.model.max_sequence_length
        self.row_tokens, self.tokens = tokens, tokens // layout.context
        self.local = self.tokens // layout.tensor
        self.wide = machine.bytes_of.activation
        chunks = layout.stage_chunks(stage, config.model.num_layers)
        self.last = stage == layout.pipeline - 1
        self.blocks = sum(map(len, chunks))
        self.passes = self.blocks * (3 if config.model.recompute else 2)  # forward, backward, forward again
        if self.last:
            self.passes += 2 * config.model.mtp_depth

    def all(self) -> list[Traffic]:
        """Every kind that this layout has."""
        kinds = (self.sequence, self.context, self.expert, self.pipeline, self.gradients, self.parameters, self.tied)
        return [traffic for kind in kinds if (traffic := kind()) is not None]

    def sequence(self) -> Traffic | None:
        """[L,D] gathered for q, k, v and the shared expert, scattered behind attention and it; backward the reverse."""
        n = self.layout.tensor
        if n == 1:
            return None
        whole = self.tokens * self.model.hidden_size * self.wide
        count = self.passes * (6 if self.model.shared_expert_intermediate_size else 4)
        count += 2 * (self.stage == 0) + 2 * self.last * (1 + self.model.mtp_depth)
        size = _ring(whole, n) * (1.5 if self.machine.shared else 1.0)  # gloo adds up everywhere to reduce and scatter
        what = "gather, reduce-scatter around attention"
        return self._repeated("sequence", what, "tensor", size, count, copied=COPY * whole)

    def context(self) -> Traffic | None:
        """Keys and values of the other parts of the sequence, and their gradients back."""
        n = self.layout.context
        if n == 1:
            return None
        m = self.model
        whole = 2 * self.row_tokens * m.num_kv_heads // self.layout.tensor * m.head_dim * self.wide
        size = _ring(whole, n) * (1.5 if self.machine.shared else 1.0)
        what = "keys and values, and their gradients"
        count, parts = self.passes, CONTEXT_MESSAGES / 2
        return self._repeated("context", what, "context", size, count, copied=2 * COPY * whole, parts=parts)

    def expert(self) -> Traffic | None:
        """[L,D] to the ranks that hold a token's experts, with its weights and choices [L,K], and sums back."""
        n = self.layout.expert
        if n == 1:
            return None
        m = self.model
        leaving = self.local * ranks_of_a_token(m, self.layout) * (n - 1) / n
        sent = leaving * (m.hidden_size * self.wide + 4 * m.experts_per_token)
        near = n if self.machine.shared else min(n, self.machine.devices_per_node)
        far = sent * (n - near) / (n - 1)
        what, count, parts = "tokens to experts and back", 2 * self.passes, DISPATCH_MESSAGES / 4
        if far:
            return self._repeated("expert", what, "expert", far, count, sent - far, parts=parts)
        rows = self.local * ranks_of_a_token(m, self.layout) * m.hidden_size * self.wide
        return self._repeated("expert", what, "expert", sent, count, copied=DISPATCH_PASSES / 2 * rows, parts=parts)

    def pipeline(self) -> Traffic | None:
        """[L,D] to the next chunk, its gradient to the one before."""
        if self.layout.pipeline == 1:
            return None
        ends = (self.stage == 0) + self.last
        count = 2 * self.layout.virtual - ends
        size = self.local * self.model.hidden_size * self.wide
        return self._repeated("pipeline", "states to the next stage, gradients back", "pipeline", size, count)

    def gradients(self) -> Traffic | None:
        """Summed over replicas, each in its group: what tensor ranks divide, what they hold whole, routed experts.

        ZeRO stage 2 sends them to their owners after every micro-batch, and sums those of the owners at the end.
        """
        layout, size = self.layout, self.machine.bytes_of.gradient
        held, owned = held_by_stage(self.model, layout, self.stage), owned_by_stage(self.model, layout, self.stage)
        whole, dense, experts = replicated_in_tensor_group(self.model, layout, self.stage), held.dense, held.experts
        group = "dense" if layout.dense_replicas > 1 else "tensor"
        if layout.sharding_stage == 1:
            sent = 2 * _ring(dense - whole, layout.dense_replicas)
            sent += 2 * _ring(whole, layout.stage_ranks) + 2 * _ring(experts, layout.expert_replicas)
            joined = 0 if layout.sharding > 1 else dense * (layout.stage_ranks > 1)
            joined += experts * (layout.expert_replicas > layout.expert_sharding)
            count = self.tensors if layout.sharding > 1 else 1
            return self._once("gradients", "summed over replicas", group, sent * size, 2 * COPY * joined * size, count)
        sent = self.micro_batches * (_ring(dense, layout.sharding) + _ring(experts, layout.expert_sharding))
        sent += 2 * _ring(owned.dense, layout.stage_ranks // layout.sharding)
        joined = owned.dense * (layout.stage_ranks > layout.sharding)
        what = "to their owners, in every micro-batch"
        count = self.micro_batches * self.tensors
        return self._once("gradients", what, group, sent * size, 2 * COPY * joined * size, count)

    def parameters(self) -> Traffic | None:
        """ZeRO: the updated parameters, from their owners. (Its half of the sum above ends with the owner.)"""
        held, layout = held_by_stage(self.model, self.layout, self.stage), self.layout
        sent = _ring(held.dense, layout.sharding) + _ring(held.experts, layout.expert_sharding)
        groups = ["sharding", "expert_replicas"] if layout.expert_sharding > 1 else ["sharding"]
        group = max(groups, key=layout.span)
        size = sent * self.machine.bytes_of.parameter
        return self._once("ZeRO gather", "updated parameters", group, size, count=self.tensors)

    def tied(self) -> Traffic | None:
        """Gradients of the tables that several stages hold."""
        count = tied_parameters(self.model, self.layout)
        return self._once("tied tables", "gradients between stages", "ends", count * self.machine.bytes_of.gradient)

    @property
    def tensors(self) -> int:
        """Parameters of a rank: ZeRO sends each by itself."""
        return len(stage_shapes(self.model, self.layout, self.stage))

    def _repeated(
        self,
        kind: str,
        what: str,
        group: str,
        size: float,
        count: int,
        near: float = 0.0,
        copied: float = 0.0,
        parts: float = 1.0,
    ) -> Traffic:
        """``count`` times ``size`` bytes in each micro-batch, in ``parts`` messages, beside ``near`` within the node.

        To make and to take them, ``copied`` bytes pass through memory; around them the ranks compute.
        """
        link, rate = self._link(group)
        times = count * self.micro_batches
        seconds = max(size / rate, near / (self.machine.intra_bandwidth * 1e9))
        seconds += parts * (self._latency + self._wake_up)
        seconds = times * (seconds + self.machine.seconds_of_passes(copied, self.layout.world))
        hidden = HIDDEN[self.layout.dispatcher] if kind == "expert" else 0.0
        return Traffic(kind, what, link, times * (size + near), seconds, seconds * (1 - hidden), True)

    def _once(
        self, kind: str, what: str, group: str, sent: float, copied: float = 0.0, count: int = 1
    ) -> Traffic | None:
        """``sent`` bytes at the end of a step, in ``count`` messages behind one another."""
        if not sent:
            return None
        link, rate = self._link(group)
        seconds = sent / rate + count * self._latency + self._wake_up
        seconds += self.machine.seconds_of_passes(copied, self.layout.world)
        return Traffic(kind, what, link, sent, seconds, seconds, False)

    @property
    def _latency(self) -> float:
        return self.machine.latency * self.machine.crowd(self.layout.world)

    @property
    def _wake_up(self) -> float:
        """Where several processes share a core, others run."""
        return self.machine.wake_up / self.machine.crowd(self.layout.world)

    def _link(self, group: str) -> tuple[str, float]:
        machine = self.machine
        if machine.shared or self.layout.span(group) <= machine.devices_per_node:
            return NODE, machine.intra_bandwidth * 1e9 / machine.crowd(self.layout.world)
        if not machine.inter_bandwidth:
            raise ValueError(
                f"{machine.name} has no network (inter_bandwidth is 0) and {machine.devices_per_node} devices a node; "
                f"{self.layout.world} processes need several nodes"
            )
        return NETWORK, machine.inter_bandwidth * 1e9


def _ring(size: float, ranks: int) -> float:
    return size * (ranks - 1) / ranks
