"""Bytes one rank needs: parameters, gradients, optimizer state, activations, and what an uneven router adds.

Activations are what our kernels and Paddle's operators keep for the backward pass, tensor by tensor (compare
``custom_ops/*/binding.h``); the peak of a step follows the backward pass block by block. Rows of text alone are
assumed: every position has a text label, which is the worst case where the vocabulary is wide.

T tokens whose attention this rank computes, L of them it holds between attentions (T / tensor), S of the whole row,
R tokens that its experts receive, D hidden, N query and G key/value heads of this rank, h head_dim, E experts, K of
them a token, F and Fs widths of a routed and the shared expert.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property

from ernie5.config import Config
from ernie5.planning.layout import Layout, micro_batches, ranks_of_a_token
from ernie5.planning.machine import Precision
from ernie5.planning.shards import (
    held_by_block,
    held_by_stage,
    owned_by_stage,
    replicated_in_tensor_group,
    tied_parameters,
)

BATCH_BYTES = 72  # of one position: five int64 fields, three float32 positions, four int32 intervals, a float32 weight
MILD_SKEW = 2.0  # the busiest rank's experts receive so many times their share


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the fullest rank of a stage. ``total`` counts tensors only; see ``Machine.reserve`` and ``slack``."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # kept for the backward pass when most are, all micro-batches in flight
    working: int  # beyond these at the peak of the step: gradients of activations, gathered parts, message buffers

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


class StageMemory:
    """Memory of the ranks of one stage. ``skew`` multiplies the tokens that a rank's experts receive."""

    def __init__(self, config: Config, layout: Layout, precision: Precision, stage: int, skew: float = 1.0) -> None:
        self.model, self.layout, self.bytes, self.stage = config.model, layout, precision, stage
        self.micro_batches = micro_batches(config.trainer)
        self.held = held_by_stage(config.model, layout, stage)
        self.owned = owned_by_stage(config.model, layout, stage)
        self.block = held_by_block(config.model, layout)
        self.row_tokens = config.trainer.rows_per_step * config.model.max_sequence_length
        self.tokens = self.row_tokens // layout.context
        self.local = self.tokens // layout.tensor
        self.last = stage == layout.pipeline - 1
        self.blocks = sum(map(len, layout.stage_chunks(stage, config.model.num_layers)))
        self.sub_batched = 0 < config.model.moe_sub_batch < self.local
        self.skew = skew

    # ------------------------------------------------------------------ what does not depend on the batch

    @property
    def parameters(self) -> int:
        return self.held.total * self.bytes.parameter

    @property
    def gradients(self) -> int:
        """Of everything a rank holds."""
        return self.held.total * self.bytes.gradient

    @property
    def optimizer(self) -> int:
        return self.owned.total * self.bytes.optimizer

    # ------------------------------------------------------------------ activations

    @cached_property
    def received(self) -> int:
        """R of one micro-batch: a token travels once to each rank that has some of its experts.

        At the worst every token of the expert group comes here.
        """
        if self.layout.expert == 1:
            return self.local
        fair = self.local * ranks_of_a_token(self.model, self.layout)
        return math.ceil(min(fair * self.skew, self.local * self.layout.expert))

    @cached_property
    def kept_of_attention(self) -> int:
        """First norm to residual: input and 1/rms [L,D]; normed; q, out [T,N,h]; k, v [S,G,h]; lse; sum [L,D].

        Tensor ranks gather the normed tokens [T,D] for each of the three projections.
        """
        m, a, tensor = self.model, self.bytes.activation, self.layout.tensor
        normed = self.tokens * m.hidden_size * (3 if tensor > 1 else 1)
        heads = 2 * (self.tokens * m.num_heads + self.row_tokens * m.num_kv_heads) * m.head_dim // tensor
        lse = 4 * self.tokens * m.num_heads // tensor
        return a * (2 * self.local * m.hidden_size + normed + heads) + lse + 8 * self.local

    @cached_property
    def kept_of_router(self) -> int:
        """Normed [L,D] (again in float32 where it is narrower), logits, choices, weights and order [L,K]."""
        m, a = self.model, self.bytes.activation
        wide = 4 if a < 4 else 0
        return self.local * ((a + wide) * m.hidden_size + 4 * m.num_experts + 12 * m.experts_per_token)

    @cached_property
    def kept_of_experts(self) -> int:
        """Hidden [R*K,2F]; of tokens that came from other ranks also themselves [R,D] and their choices.

        With sub-batches none of that stays, but slices of input, weights and choices do.
        """
        m, a = self.model, self.bytes.activation
        if self.sub_batched:
            return self.local * (a * m.hidden_size + 8 * m.experts_per_token)
        return self._expert_bytes(self.received)

    def _expert_bytes(self, received: int) -> int:
        m, a = self.model, self.bytes.activation
        arrived = a * m.hidden_size + 12 * m.experts_per_token if self.layout.expert > 1 else 0
        return received * (a * m.experts_per_token * 2 * m.expert_intermediate_size + arrived)

    @cached_property
    def kept_of_shared(self) -> int:
        """Hidden [L,2Fs], in float32 the activation [L,Fs]; tensor ranks divide the width and gather tokens [T,D]."""
        m, a = self.model, self.bytes.activation
        if not m.shared_expert_intermediate_size:
            return 0
        gathered = self.tokens * m.hidden_size if self.layout.tensor > 1 else 0
        widths = 3 if a == 4 else 2
        return a * (widths * self.local * m.shared_expert_intermediate_size + gathered)

    @cached_property
    def kept_of_block(self) -> int:
        """Bytes of one block's tensors that wait for its backward pass, one micro-batch."""
        return self.kept_of_attention + self.kept_of_router + self.kept_of_experts + self.kept_of_shared

    @cached_property
    def made_by_block(self) -> int:
        """The same where expert sub-batches keep nothing: what passes through memory."""
        return self.kept_of_block - self.kept_of_experts + self._expert_bytes(self.received)

    @cached_property
    def kept_of_checkpoint(self) -> int:
        """What stays of a block between the passes: everything, or its input [L,D] where it is recomputed."""
        return self.states if self.model.recompute else self.kept_of_block

    @cached_property
    def fields(self) -> int:
        """Fields of a micro-batch; all micro-batches of a step are on the device before it begins."""
        m = self.model
        return self.local * (BATCH_BYTES + 8 * m.vision_bits + 16 * m.audio_levels)

    @cached_property
    def tables(self) -> int:
        """cos and sin [T,h/2] of a micro-batch."""
        return 4 * self.tokens * self.model.head_dim

    @cached_property
    def logits(self) -> int:
        """One matrix [T, V / tensor], as it is kept for the loss."""
        size = self.bytes.split_logits if self.layout.tensor > 1 else self.bytes.logits
        return self.tokens * self.model.vocab_size // self.layout.tensor * size

    @cached_property
    def kept_of_heads(self) -> int:
        """Of the last stage: rows before and after the norm [T,D], logits, and the same again with a block for MTP.

        MTP keeps states, embeddings, both joined, its block (never recomputed) and its output twice: 6 D a row.
        """
        if not self.last:
            return 0
        wide = self.bytes.activation * self.tokens * self.model.hidden_size
        mtp = self.kept_of_block + 6 * wide + self.logits + self.tables
        return 2 * wide + self.logits + self.model.mtp_depth * mtp

    @cached_property
    def flying(self) -> int:
        """Chunk passes that wait for their backward pass."""
        return self.layout.in_flight(self.stage, self.micro_batches)

    @cached_property
    def open_batches(self) -> int:
        return math.ceil(self.flying / self.layout.virtual)

    @cached_property
    def states(self) -> int:
        """One tensor of all tokens a rank holds between attentions, [L,D]."""
        return self.bytes.activation * self.local * self.model.hidden_size

    @cached_property
    def kept_of_batches(self) -> int:
        """Fields and tables; in a pipeline also what each chunk pass handed on, from which its backward pass starts."""
        handed_on = self.flying * self.states if self.layout.pipeline > 1 else 0
        return self.micro_batches * self.fields + self.open_batches * self.tables + handed_on

    @cached_property
    def fed_back(self) -> int:
        """Blocks of this stage behind which audio codes are added (report §2.3.2); the states before stay, too."""
        m = self.model
        chunks = self.layout.stage_chunks(self.stage, m.num_layers)
        return sum(m.num_layers - m.audio_levels <= i < m.num_layers - 1 for chunk in chunks for i in chunk)

    @cached_property
    def kept_of_blocks(self) -> int:
        """Of all chunk passes in flight."""
        passes = self.flying * self.blocks // self.layout.virtual
        return passes * self.kept_of_checkpoint + self.open_batches * self.fed_back * self.states

    @cached_property
    def activations(self) -> int:
        """Kept when most micro-batches are in flight; the heads are done with one before the next begins."""
        return self.kept_of_blocks + self.kept_of_batches + self.kept_of_heads

    # ------------------------------------------------------------------ the peak of a step

    @cached_property
    def table(self) -> int:
        """The gradient of the token table [V / tensor, D], which heads and look-ups each make whole and then add up."""
        return self.bytes.gradient * self.model.vocab_size // self.layout.tensor * self.model.hidden_size

    @property
    def work_of_heads(self) -> int:
        """Gradients of the rows [T,D] and of the table; that of the logits takes their place.

        The gradient of the head of MTP comes beside that of the text head, whose logits are gone by then. Where a loss
        is added up over parts of the vocabulary on the CPU, three more matrices like the logits exist before that.
        """
        if not self.last:
            return 0
        rows = self.bytes.activation * self.tokens * self.model.hidden_size
        both = 2 * self.table - self.logits if self.model.mtp_depth else 0
        split = self.logits * self.bytes.split_loss if self.layout.tensor > 1 else 0
        return rows + max(self.table, both, split)

    @cached_property
    def work_of_block(self) -> int:
        """Beyond what is kept while a block's experts run backward: rows [R*K,D] and three of [R*K,F], in- and output.

        Or three of [L,Fs] for the shared expert, where that is more. Tokens of other ranks arrive and leave as
        gradients. Recomputation first brings the block's tensors back.
        """
        m, a = self.model, self.bytes.activation
        received, again = self.received, self.kept_of_block - self.kept_of_checkpoint
        if self.sub_batched:
            received = math.ceil(received * m.moe_sub_batch / self.local)
            again += self._expert_bytes(received)
        routed = received * m.experts_per_token * (m.hidden_size + 3 * m.expert_intermediate_size)
        travelling = 0
        if self.layout.expert > 1:
            sent = self.local * min(m.experts_per_token, self.layout.expert)
            travelling = 2 * (received + sent) * m.hidden_size
        shared = 3 * self.local * m.shared_expert_intermediate_size
        return again + a * (max(routed + travelling, shared) + 3 * self.local * m.hidden_size)

    @property
    def summed_copy(self) -> int:
        """Gradients that one group of ranks adds up are joined in one buffer for that, a group after the other.

        ZeRO adds up in place onto the owners; they join what they own, to add it up over further replicas.
        """
        layout, dense = self.layout, self.owned.dense
        whole = min(replicated_in_tensor_group(self.model, layout, self.stage), dense)
        groups: Counter[int] = Counter()  # by how far apart its ranks are; 0: on other stages
        if layout.stage_ranks > layout.sharding:
            groups[1] += whole
        if layout.dense_replicas > layout.sharding:
            groups[layout.tensor] += dense - whole
        if layout.expert_replicas > layout.expert_sharding:
            groups[layout.expert] += self.owned.experts
        if self.stage == 0 or self.last:
            groups[0] += tied_parameters(self.model, layout)
        return max(groups.values(), default=0) * self.bytes.gradient

    def peak(self) -> RankMemory:
        """The fullest moment: backward through the heads, MTP, a block or the look-up, or the sum over replicas.

        ``gradients`` and ``activations`` are those of that moment.
        """
        own, fields = self.owned.total * self.bytes.gradient, self.micro_batches * self.fields
        moments = [(own, fields, self.summed_copy)]
        if self.layout.sharding_stage == 2:
            moments += self._collected(own)
        elif self.micro_batches > 1:
            moments += [(self.gradients, fields, 0), *self._several_backward()]
        else:
            moments += [(self.gradients, fields, 0), (0, self.activations, self.work_of_heads), *self._backward(0)]
        gradients, activations, work = max(moments, key=sum)
        return RankMemory(self.parameters, gradients, self.optimizer, activations, work)

    def _collected(self, own: int) -> list[tuple[int, int, int]]:
        """(gradients, activations, working bytes) of ZeRO stage 2.

        There are sums of what the rank owns, from the first micro-batch on, and gradients of the heads and of one block
        at a time, which then go to their owners.
        """
        of_block = self.block.total * self.bytes.gradient
        before = own if self.micro_batches > 1 else 0
        outside = self.gradients - self.blocks * of_block
        mtp = self.kept_of_block if self.last and self.model.mtp_depth else 0
        first = self.kept_of_blocks + self.kept_of_batches
        last = first - (self.blocks // self.layout.virtual - 1) * self.kept_of_checkpoint
        moments = [
            (before, self.activations, self.work_of_heads),
            (before + outside + of_block, first + mtp, self.work_of_block),
            (own + outside + of_block, last, self.work_of_block),
        ]
        if self.stage == 0:
            moments.append((own + outside, self.kept_of_batches, self.table + self.states))
        return moments

    def _several_backward(self) -> list[tuple[int, int, int]]:
        """(gradients, activations, working bytes) of the first backward pass of several, and of those that add to it.

        A block's expert gradients exist once more until they are added, and so does that of the table, from the first
        head to the last look-up.
        """
        everything = self.kept_of_blocks + self.kept_of_batches
        later = min(self.flying, (self.micro_batches - 1) * self.layout.virtual)  # once the first pass is through
        below = everything * later // self.flying
        block = self.work_of_block + self.block.experts * self.bytes.gradient
        waiting = self.table if self.last and self.layout.pipeline == 1 else 0
        moments = [(0, self.activations, self.work_of_heads), (self.gradients, below, block + waiting)]
        moments.append((self.gradients, below + self.kept_of_heads, self.work_of_heads))
        for done in range(self.blocks // self.layout.virtual):  # in the first pass gradients come as activations go
            new = (done + 1) * self.block.total * self.bytes.gradient
            moments.append((new, everything - done * self.kept_of_checkpoint, self.work_of_block))
        if self.last and self.model.mtp_depth:
            ahead = self.kept_of_heads - (1 + self.model.mtp_depth) * self.logits
            moments.append((self.gradients, below + ahead, block + self.table))
        if self.stage == 0:
            moments.append((self.gradients, self.kept_of_batches, self.table + waiting + self.states))
        return moments

    def _backward(self, gradients: int) -> list[tuple[int, int, int]]:
        """(gradients, activations, working bytes) while each block, the last first, runs backward, then the look-up.

        Gradients appear as activations go, on top of those there are.
        """
        of_block = self.block.total * self.bytes.gradient
        gradients += self.gradients - self.blocks * of_block  # of the heads and the block of MTP
        rest = self.micro_batches * self.fields + self.tables
        mtp = self.kept_of_block if self.last and self.model.mtp_depth else 0
        moments = [(gradients, self.kept_of_blocks + rest + mtp, self.work_of_block)]
        for block in range(self.blocks, 0, -1):
            gradients += of_block
            kept = block * self.kept_of_checkpoint + min(block, self.fed_back) * self.states
            moments.append((gradients, kept + rest, self.work_of_block))
        if self.stage == 0:
            moments.append((gradients, rest, self.table + self.states))
        return moments
