"""Layouts against one process, a few steps in float64: the short form of ``benchmarks/parity.py``."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from ernie5.ops import kernels

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "parity.py"
LIMIT = 1e-8


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("parity", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(dtype="float64", steps=2, changes=json.dumps(changes))


@pytest.fixture(scope="module")
def one_process(parity, tmp_path_factory) -> dict[str, np.ndarray]:
    return parity.run("one", 1, options(), tmp_path_factory.mktemp("one"))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("zero2x4.ep2", {"recompute": True}),
        ("zero2x2.pp2", {}),
        ("cp2", {"recompute": True}),
        ("pp2-virtual2", {"recompute": True}),
        ("tp2.pp2", {}),
        ("ep2.tp2", {"moe_sub_batch": 20}),
    ],
)
def test_a_layout_equals_one_process(parity, one_process, tmp_path, layout, changes):
    found = parity.run(layout, parity.LAYOUTS[layout][0], options(**changes), tmp_path)
    differences = parity.compare(one_process, found)
    assert max(differences.values()) <= LIMIT, differences


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ep2.tp2", "zero2x2.pp2"])
def test_a_layout_in_bfloat16_loses_what_one_process_does(parity, tmp_path, layout):
    """Of every axis the operators that Paddle's CPU build lacks in bfloat16."""
    if not kernels.available("linear"):
        pytest.skip("Paddle's CPU operators lack bfloat16")
    given = options()
    given.dtype = "bfloat16"
    found = [parity.run(name, count, given, tmp_path) for name, count in (("one", 1), (layout, 4))]
    assert parity.compare(*found)["loss"] <= parity.LIMITS["bfloat16"]


def test_the_comparison_sees_a_small_difference(parity):
    expected = {"loss/0/text": np.float64(2.0), "gradients/w": np.array([1.0, 100.0])}
    found = {"loss/0/text": np.float64(2.0), "gradients/w": np.array([1.0, 100.0001])}
    assert parity.compare(expected, expected) == dict.fromkeys(("loss", "norm", "gradients", "parameters"), 0.0)
    assert parity.compare(expected, found)["gradients"] == pytest.approx(1e-6)
    assert parity.compare(expected, {**found, "gradients/w": np.array([np.nan, 0.0])})["gradients"] == np.inf
