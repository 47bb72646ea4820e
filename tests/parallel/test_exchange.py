"""Rows arrive where they belong, of every type and in every number, and a rank that is gone is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ernie5.ops import kernels
from ernie5.parallel.launch import launch

WORKER = Path(__file__).with_name("exchange_worker.py")
ROOT = WORKER.parents[2]


def run(task: str, ranks: int, choice: str = "") -> list[str]:
    environment = {"PYTHONPATH": str(ROOT)} | ({kernels.CHOICE_VARIABLE: choice} if choice else {})
    return launch([sys.executable, str(WORKER), task], ranks, timeout=100, environment=environment)


@pytest.mark.dist
@pytest.mark.parametrize("choice", ["", "reference"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_and_gradients_arrive(ranks, choice):
    found = [output.split()[-1] for output in run("rows", ranks, choice)]
    compiled = not choice and kernels.available("exchange_start")
    assert found == ["compiled" if compiled else "reference"] * ranks


@pytest.mark.dist
def test_a_rank_that_is_gone_is_named():
    if not kernels.available("exchange_start"):
        pytest.skip("the kernels are not compiled")
    assert "told after" in run("silent", 2)[0]
