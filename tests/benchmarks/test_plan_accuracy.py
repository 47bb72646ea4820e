"""What ``benchmarks/plan_accuracy.py`` makes of what it measured."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from benchmarks import common, plan_accuracy


@pytest.fixture
def report():
    return common.Report("test", argparse.Namespace(json=None, append=False, realtime=False))


def planned(seconds: float = 1.0, total: int = 100) -> SimpleNamespace:
    stage = SimpleNamespace(memory=SimpleNamespace(total=total), held=SimpleNamespace(total=total))
    return SimpleNamespace(time=SimpleNamespace(total=seconds), stages=[stage, stage])


def test_order_counts_the_pairs_that_differ_by_more_than_a_tenth(report):
    found = {
        name: [{"seconds": s / 2}, {"seconds": s}] for name, s in {"a": 1.0, "b": 1.05, "c": 2.0, "d": 3.0}.items()
    }
    plans = {name: planned(s) for name, s in {"a": 1.0, "b": 0.5, "c": 4.0, "d": 3.0}.items()}
    plan_accuracy.report_time(report, found, plans)
    assert report.figures["step_time_pairs"] == 5  # a and b are alike
    assert report.figures["step_time_order"] == pytest.approx(4 / 5)
    assert any("| c   | d     |" in section for section in report.sections)


def test_memory_is_judged_by_the_worst_rank(report):
    ranks = [{"stage": s, "peak": peak, "allocated": 100} for s, peak in ((0, 100), (1, 80))]
    plan_accuracy.report_memory(report, {"run": ranks}, {"run": planned()})
    assert report.figures["memory_error_max"] == pytest.approx(0.25) == report.figures["memory_error_max_several"]
    assert "| 1 of 2 |" in report.sections[0]


def test_a_parameter_too_many_is_seen(report, monkeypatch):
    monkeypatch.setattr(plan_accuracy, "PRESETS", ("tiny",))
    monkeypatch.setattr(plan_accuracy.common, "ROOT", plan_accuracy.Path("nowhere"))
    found = {"run": [{"stage": 0, "parameters": 100}, {"stage": 1, "parameters": 103}]}
    plan_accuracy.report_parameters(report, {}, {})
    assert report.figures["parameter_count_difference_max"] == 0
    plan_accuracy.report_parameters(report, found, {"run": planned()})
    assert report.figures["parameter_count_difference_max"] == 3
