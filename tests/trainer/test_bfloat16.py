"""Training in bfloat16: near float32, resumed bit-equal, with float32 masters that either precision goes on from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ernie5.ops import kernels
from tests.trainer.test_training import read_log
from tests.trainer.tiny_run import tiny_config, tiny_model, tiny_trainer

COMPILED = pytest.mark.skipif(not kernels.available("linear"), reason="no compiled kernels on this machine")


def train(run_dir: Path, steps: int, bf16: bool, resume: bool = False) -> tuple[list[dict], dict[str, np.ndarray]]:
    """(log, final weights)."""
    model = tiny_model()
    if bf16:
        model.to_bfloat16()
    config = tiny_config(steps, learning_rate=1.0e-2, decay_fraction=0.0, warmup_steps=1)
    tiny_trainer(run_dir, config, model=model).train(resume=resume)
    return read_log(run_dir), load_file(run_dir / "checkpoints" / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[bool, tuple[list[dict], dict[str, np.ndarray]]]:
    return {bf16: train(tmp_path_factory.mktemp("run"), 9, bf16) for bf16 in (False, True)}


@COMPILED
def test_losses_are_near_those_of_float32(runs):
    (wide, _), (half, _) = runs[False], runs[True]
    losses = np.array([[record["loss/text"], record["loss/image"], record["loss/audio"]] for record in wide + half])
    wide, half = np.split(losses, 2)
    assert wide[-1, 0] < wide[0, 0] - 0.05
    assert 0 < np.abs(half / wide - 1).max() < 0.03


@COMPILED
def test_checkpoints_hold_float32_masters(runs):
    weights = runs[True][1]
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}
    query = weights["layers.0.attention.q_proj.weight"].view(np.uint32)
    assert np.count_nonzero(query & 0xFFFF) > query.size / 2, "rounded to bfloat16"


@COMPILED
@pytest.mark.parametrize("first", [True, False], ids=["bfloat16 first", "float32 first"])
@pytest.mark.parametrize("then", [True, False], ids=["then bfloat16", "then float32"])
def test_either_precision_goes_on_from_either(tmp_path, runs, first, then):
    train(tmp_path, 5, first)
    log, weights = train(tmp_path, 9, then, resume=True)
    expected_log, expected = runs[then]
    if first == then:
        assert log == expected_log
        for name, value in expected.items():
            np.testing.assert_array_equal(weights[name], value)
    else:
        losses = [[record["loss/text"] for record in records] for records in (log, expected_log)]
        np.testing.assert_allclose(*losses, rtol=0.03)


def test_without_the_kernels_a_cpu_refuses_in_one_line(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda name: False)
    with pytest.raises(ValueError, match="bfloat16 on a CPU needs the compiled kernels") as caught:
        tiny_model().to_bfloat16()
    assert "\n" not in str(caught.value)
