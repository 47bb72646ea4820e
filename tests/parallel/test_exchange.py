"""Rows arrive where they belong, of every type and in every number, and a rank that is gone is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ernie5.ops import build, kernels
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


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_nothing_is_sent_before_its_exchange_can_receive(tmp_path):
    """Else the word that there is room queues behind rows, and both directions of a link work by turns.

    Of three pieces, the two of an exchange that receives nothing need not wait.
    """
    sources = [str(WORKER.with_name("channel_check.cc")), str(build.SOURCES / "exchange" / "exchange.cc")]
    program = tmp_path / "channel_check"
    flags = ["-std=c++17", "-O1", f"-I{build.SOURCES}", "-lpthread", "-o", str(program)]
    subprocess.run([build.compiler(), *sources, *flags], check=True, timeout=300)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "sent 2 before and 3 after, received 41\n"
