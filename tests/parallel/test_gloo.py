"""The gloo completion: it refuses a Paddle nobody tried, and its split loss is the loss."""

from __future__ import annotations

import sys
from pathlib import Path

import paddle
import pytest

from ernie5.parallel import gloo
from ernie5.parallel.launch import launch

CHECK = Path(__file__).with_name("gloo_check.py")


def test_another_paddle_is_refused(monkeypatch):
    monkeypatch.setattr(paddle, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"Paddle 9.9.9: training over gloo was tested with 3.3.1 only"):
        gloo.install()


@pytest.mark.dist
def test_what_it_fills_is_right_on_three_processes():
    """Three, because between two every order of messages and every group of some ranks happens to work."""
    outputs = launch([sys.executable, str(CHECK)], 3, 90, {"PYTHONPATH": str(Path(__file__).parents[2])})
    assert [output.splitlines()[-1] for output in outputs] == ["right"] * 3
