"""Checkpoints between layouts, and killed processes: the short form of ``benchmarks/reshard.py``, in float64."""

from __future__ import annotations

import pytest

from benchmarks import reshard

LIMIT = 1e-8


@pytest.mark.dist
@pytest.mark.slow
def test_each_layout_continues_from_the_other_as_one_process_would(tmp_path) -> None:
    figures = reshard.reshard(["tp2", "zero1x2"], tmp_path)
    assert figures.keys() >= {"loss:tp2->zero1x2", "loss:zero1x2->tp2", "parameters:tp2->tp2"}
    assert max(figures.values()) <= LIMIT, figures


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_with_killed_processes_ends_as_one_without(tmp_path) -> None:
    figures = reshard.kill("pp2", 2, 0, tmp_path)
    assert figures.pop("kills") == 2
    figures.pop("killed_while_saving")  # chance
    assert max(figures.values()) == 0, figures
