"""Expert parallelism in several processes says what one process says: outputs and gradients, whoever has tokens."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
import paddle
import pytest

from ernie5.ops import kernels
from ernie5.parallel.dispatch import Local, chunk_of, make_dispatcher
from ernie5.parallel.launch import launch
from tests.parallel import dispatch_worker as worker

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = {  # name -> ranks, type, kernels, allowed relative error
    "2 ranks, float64, reference": (2, "float64", "reference", 1e-12),
    "3 ranks, float64": (3, "float64", "", 1e-12),
    "4 ranks, float32": (4, "float32", "", 1e-5),
    "2 ranks, bfloat16": (2, "bfloat16", "", 3e-2),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every rank of a setting found, each setting run once."""

    @cache
    def run(setting: str) -> list[dict[str, np.ndarray]]:
        ranks, dtype, choice, _ = SETTINGS[setting]
        folder = tmp_path_factory.mktemp("dispatch")
        environment = {"PYTHONPATH": str(ROOT)} | ({kernels.CHOICE_VARIABLE: choice} if choice else {})
        launch([sys.executable, worker.__file__, str(folder), dtype], ranks, timeout=120, environment=environment)
        return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(ranks)]

    return run


@cache
def expected(case: str, ranks: int) -> dict[str, np.ndarray]:
    """All ranks' tokens through all experts in one process, in float64."""
    inputs = [worker.case_inputs(case, rank, ranks) for rank in range(ranks)]
    together = {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}
    return worker.run_case(Local(), together, slice(0, worker.EXPERTS), "float64")


def gathered(found: list[dict[str, np.ndarray]], prefix: str) -> dict[str, np.ndarray]:
    """One process's view: tokens and experts side by side, gradients of what every rank has summed up."""
    joined = {}
    for name in ("y", "dx", "dweights", "dgate_up", "ddown"):
        joined[name] = np.concatenate([one[f"{prefix}/{name}"] for one in found])
    for name in ("dshared_gate_up", "dshared_down"):
        joined[name] = np.sum([one[f"{prefix}/{name}"] for one in found], axis=0)
    return joined


@pytest.mark.dist
@pytest.mark.parametrize("dispatcher", worker.DISPATCHERS)
@pytest.mark.parametrize("case", worker.CASES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_outputs_and_gradients_are_those_of_one_process(results, setting, case, dispatcher):
    ranks, _, _, allowed = SETTINGS[setting]
    found = gathered(results(setting), f"{case}/{dispatcher}/0")
    for name, values in expected(case, ranks).items():
        assert found[name].shape == values.shape, name
        error = np.linalg.norm(found[name] - values) / max(np.linalg.norm(values), 1e-30)
        assert error <= allowed, f"{name}: relative error {error:.1e}"


@pytest.mark.dist
@pytest.mark.parametrize("case", worker.CASES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_second_time_is_the_same_bit_for_bit(results, setting, case):
    for found in results(setting):
        for name in [name for name in found if name.startswith(f"{case}/") and "/0/" in name]:
            np.testing.assert_array_equal(found[name], found[name.replace("/0/", "/1/")], err_msg=name)


@pytest.mark.dist
@pytest.mark.parametrize("case", worker.CASES)
@pytest.mark.parametrize("overlapped", worker.OVERLAPPED)
@pytest.mark.parametrize("setting", [name for name in SETTINGS if "float32" in name])
def test_overlapping_changes_no_bit_of_what_a_token_sees(results, setting, overlapped, case):
    """Weight gradients are sums over chunks and so differ by rounding; outputs and gradients of tokens do not."""
    for found in results(setting):
        for name in ("y", "dx", "dweights"):
            plain, parts = (found[f"{case}/{dispatcher}/0/{name}"] for dispatcher in ("all_to_all", overlapped))
            np.testing.assert_array_equal(plain, parts, err_msg=name)


@pytest.mark.parametrize(
    ("tokens", "chunks", "sizes"),
    [(24, 4, [4, 8, 8, 4]), (8, 3, [2, 4, 2]), (7, 2, [4, 3]), (5, 1, [5]), (2, 8, [1, 0, 0, 0, 1]), (0, 3, [])],
)
def test_the_first_and_the_last_chunk_are_half_as_large(tokens, chunks, sizes):
    assert np.bincount(chunk_of(np.arange(tokens), tokens, chunks)).tolist() == sizes


@pytest.mark.parametrize(
    ("name", "chunks", "message"),
    [
        ("all2all", 4, "'all2all' is unknown; choose one of local, all_to_all"),
        ("deepep", 4, "needs a GPU"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(name, chunks, message):
    if paddle.device.is_compiled_with_cuda() and name == "deepep":
        pytest.skip("this Paddle knows GPUs")
    with pytest.raises(ValueError, match=message) as caught:
        make_dispatcher(name, None, chunks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["local", "all_to_all", "all_to_all_overlapped"])
def test_one_rank_needs_no_exchange(name):
    assert isinstance(make_dispatcher(name), Local)
