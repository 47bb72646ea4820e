"""The plan: every parameter has a kind, and parts join to what was split."""

from __future__ import annotations

import numpy as np
import pytest

from ernie5.parallel.plan import Kind, join, kind_of, split
from tests.model.helpers import tiny_model


@pytest.mark.parametrize("kind", list(Kind))
def test_parts_join_to_the_whole(kind):
    whole = np.random.default_rng(0).standard_normal((8, 12))
    parts = [split(kind, whole, part, 2) for part in range(2)]
    np.testing.assert_array_equal(join(kind, parts), whole)
    if kind is not Kind.REPLICATE:
        assert all(part.size == whole.size / 2 for part in parts)


def test_a_gated_column_keeps_gate_and_up_of_the_same_units_together():
    gate, up = np.arange(4.0), 10 + np.arange(4.0)
    whole = np.stack([np.concatenate([gate, up])])
    assert split(Kind.GATED_COLUMN, whole, 1, 2).tolist() == [[2.0, 3.0, 12.0, 13.0]]


def test_the_plan_splits_what_is_large_and_nothing_else():
    kinds = {name: kind_of(name) for name, _ in tiny_model().named_parameters()}
    assert kinds["layers.0.attention.q_proj.weight"] is Kind.COLUMN
    assert kinds["mtp.block.attention.o_proj.weight"] is Kind.ROW
    assert kinds["mtp.block.moe.shared.gate_up"] is Kind.GATED_COLUMN
    assert kinds["layers.2.moe.experts.down"] is Kind.EXPERT
    assert kinds["embedding.tokens.weight"] is Kind.VOCAB
    replicated = {name for name, kind in kinds.items() if kind is Kind.REPLICATE}
    assert {"layers.0.moe.router.weight", "norm.weight", "bit_head.weight", "mtp.proj.weight"} <= replicated
    assert not any(".attention." in name or ".experts." in name for name in replicated)
