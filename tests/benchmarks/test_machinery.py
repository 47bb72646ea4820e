"""What all benchmarks share, without any peer: processes, order of turns, medians, agreement, reports, floor."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

from benchmarks import common, floor, moe_layer, optimizer, peers
from benchmarks.common import Contender, Field
from tests.benchmarks.stand_in import Squares

BENCHMARKS = ("moe_layer", "attention", "train_step", "decode", "optimizer")


def options(*arguments):
    return common.argument_parser("test", rounds=3).parse_args(["--threads", "1", *arguments])


def squares(name, **settings):
    return Contender(name, peers.OURS, Squares, settings)


@pytest.fixture
def three():
    with Field([squares("ours"), squares("slow", pause=0.02), squares("broken", broken=True)], options()) as field:
        yield field


def test_contenders_answer_and_a_broken_one_says_why(three):
    assert list(three.workers) == ["ours", "slow"]
    assert three.failed == {"broken": "ValueError: this one cannot be built"}
    three.each(lambda w: w.ask("prepare", count=3))
    found = three.each(lambda w: w.outputs())
    np.testing.assert_array_equal(found["slow"]["squares"], [0, 1, 4])


def test_a_failing_request_takes_the_contender_out(three):
    three.each(lambda w: w.call("fail") if w.name == "slow" else None)
    assert list(three.workers) == ["ours"]
    assert three.failed["slow"] == "ZeroDivisionError: on purpose"


def test_a_wrong_contender_is_not_timed():
    with Field([squares("right"), squares("wrong", wrong=True)], options()) as field:
        errors = common.check(field, {"squares": np.arange(4.0) ** 2}, lambda name: 1e-6)
        assert errors["right"] == 0 and errors["wrong"] > 0.1
        assert list(field.workers) == ["right"]
        assert "wrong result" in field.failed["wrong"]


def test_turns_alternate_and_the_slow_one_sits_out(three):
    times = common.interleave(three, rounds=5)
    assert len(times["ours"]) == 5
    assert len(times["slow"]) in (1, 2) and min(times["slow"]) >= 0.02
    assert common.medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_order_rotates():
    assert [common._rotated(["a", "b", "c"], number) for number in range(3)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
    ]


def test_memory_of_a_step_is_reported(three):
    memory = three.workers["ours"].ask("memory")
    assert 0 < memory["before"] <= memory["peak"]


def test_bfloat16_rounding_is_to_nearest_even():
    values = np.array([1.0, 1.0 + 2**-9, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -3.14159], np.float32)
    expected = np.array([1.0, 1.0, 1.0, 1.0 + 4 * 2**-8, -3.140625], np.float32)
    np.testing.assert_array_equal(common.as_bfloat16(values), expected)


def test_report_writes_figures_and_appends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    report = common.Report("A title", options("--json", str(tmp_path / "out.json"), "--append"))
    report.speedup("speedup_e64", {"ours": 2.0, "a": 6.0, "b": 5.0}, ["a", "b"])
    report.speedup("speedup_e256", {"ours": 2.0, "a": 3.0}, ["a"])
    report.speedup("nothing", {"a": 3.0}, ["a"])
    report.worst("speedup", ["e64", "e256"])
    report.table("Times", ["who", "ms"], [("ours", 2.0), ("a", None)])
    assert report.finish() == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["figures"] == {"speedup_e64": 2.5, "speedup_e256": 1.5, "speedup": 1.5}
    assert content["machine"] and content["commit"] and content["command"]
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("\n## A title\n* Machine: ") and "| ours | 2  |" in text
    assert "Times" in capsys.readouterr().out


def test_floor_is_measured_and_positive(monkeypatch):
    monkeypatch.setattr(floor, "PRODUCTS", ((64, 64, 64),))
    monkeypatch.setattr(floor, "MEGABYTES", 1)
    rates = floor.Machine(threads=1).rates()
    assert set(rates) == {"sgemm", "copy", "read"} and min(rates.values()) > 1e6
    products, traffic = moe_layer.floor_seconds(common.SHAPES["E64"], {"sgemm": 1e12, "copy": 1e12})
    assert products == pytest.approx(12.48e-3, rel=0.01) and traffic == pytest.approx(0.154e-3, rel=0.01)


def test_missing_peers_are_named_with_the_command_that_installs_them(monkeypatch, tmp_path):
    monkeypatch.setenv(peers.VARIABLE, str(tmp_path / "nowhere"))
    with Field([Contender("theirs", peers.TORCH, Squares)], options()) as field:
        assert field.failed == {"theirs": "not installed; run python benchmarks/peers.py"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_import_without_any_framework_and_explain_themselves(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [f"benchmarks/{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0 and "--json" in capsys.readouterr().out


def test_moe_reference_has_the_gradients_of_finite_differences():
    shape = common.Shape("tiny", experts=5, width=4, hidden=6, shared=3, top_k=2, length=3, batch=2)
    found = moe_layer.reference(shape)
    x, dy, weights = moe_layer.inputs(shape)
    step = 1e-3
    for name, index in (("router", (1, 2)), ("shared_down", (0, 1)), ("down", (3, 1, 2))):
        values = []
        for sign in (1, -1):
            moved = {**weights, name: weights[name].astype(np.float64)}
            moved[name][index] += sign * step
            values.append((moe_layer.reference_of(shape, x, dy, moved)["y"] * dy.reshape(-1, shape.hidden)).sum())
        slope = (values[0] - values[1]) / (2 * step)
        assert found[f"d{name}"][index] == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_adamw_reference_moves_every_parameter_against_its_gradient(monkeypatch):
    monkeypatch.setattr(optimizer, "tensor_shapes", lambda shape: [(3,), (2, 4), (5, 2)])
    parameters, gradients = optimizer.values()
    for name, moved in optimizer.reference().items():
        before = optimizer.compared(parameters)[name]
        gradient = optimizer.compared(gradients)[name]
        np.testing.assert_allclose(
            moved - before * (1 - optimizer.RATE * optimizer.DECAY), -optimizer.RATE * np.sign(gradient), rtol=0.05
        )
