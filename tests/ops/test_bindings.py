"""The ops of the bindings against their references, forward and every gradient, in float32 and bfloat16."""

from __future__ import annotations

import os

import numpy as np
import paddle
import pytest

from ernie5.ops import kernels
from ernie5.ops.cross_entropy import cross_entropy
from ernie5.ops.elementwise import add, cast, fork
from ernie5.ops.experts import dense_ffn, moe_ffn, swiglu
from ernie5.ops.linear import linear
from ernie5.ops.norm import add_rms_norm, rms_norm
from ernie5.ops.patch_embed import patch_embed
from ernie5.ops.rope import rope_tables, uni_rope
from ernie5.ops.route import permutation, route
from tests.ops import cuda_stand_in

pytestmark = pytest.mark.skipif(not kernels.available("rms_norm"), reason="no compiled kernels on this machine")

EXPERTS = [[2, 0], [1, 2], [-1, -1], [4, 1], [0, 2]]
PATCH = ((2, 4, 4), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


def _experts(x, weights, gate_up, down):
    _, order, offsets = permutation(paddle.to_tensor(EXPERTS, dtype="int32"), 5)
    return moe_ffn(x, weights.astype("float32"), order, offsets, gate_up, down)


def _route(activation):
    def run(x, weight):
        bias, valid = paddle.linspace(-0.5, 0.5, 7), paddle.arange(9) < 8
        routing = route(x, weight, bias, valid, 3, activation, 2.5)
        return routing.weights, routing.experts, routing.counts, routing.order, routing.offsets

    return run


def _turn(q, k):
    positions = paddle.arange(2 * 5 * 3, dtype="float32").reshape([2, 5, 3])
    return uni_rope(q, k, rope_tables(positions, 8, 1e4, "hwt"))


def _bytes(weight, bias):
    video = np.random.default_rng(5).integers(0, 256, (2, 3, 8, 12, 3)).astype(np.uint8)
    return patch_embed(paddle.to_tensor(video), weight, bias, *PATCH)


def _reread(x, y):
    """Three readers of the sum, one of which leads nowhere."""
    first, second, _ = fork(add(x, y), 3)
    return first * 2.0, cast(cast(second, paddle.float32), x.dtype) * 3.0


CASES = {  # name -> (op, shapes of its inputs)
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), [(2, 3, 24), (24,)]),
    "add_rms_norm": (lambda x, r, w: add_rms_norm(x, r, w, 1e-6), [(2, 3, 24), (2, 3, 24), (24,)]),
    "cross_entropy": (lambda x: cross_entropy(x, paddle.to_tensor([3, -100, 0, 12, 7])), [(5, 13)]),
    "cross_entropy, consuming": (
        lambda x: cross_entropy(paddle.add_n([x, x]), paddle.to_tensor([3, -100, 0, 12, 7]), consume=True),
        [(5, 13)],
    ),
    "add, cast, fork": (_reread, [(3, 5, 7), (3, 5, 7)]),
    "linear": (linear, [(2, 160, 200), (200, 300)]),
    "linear, transposed": (lambda x, w: linear(x, w, transposed=True), [(160, 210), (600, 210)]),
    "swiglu": (swiglu, [(2, 3, 14)]),
    "uni_rope": (_turn, [(2, 5, 32), (2, 5, 16)]),
    "dense_ffn": (dense_ffn, [(5, 6), (6, 8), (4, 6)]),
    "moe_ffn": (_experts, [(5, 6), (5, 2), (5, 6, 8), (5, 4, 6)]),
    "route sigmoid": (_route("sigmoid"), [(9, 6), (6, 7)]),
    "route softmax": (_route("softmax"), [(9, 6), (6, 7)]),
    "patch_embed of bytes": (_bytes, [(96, 8), (8,)]),
    "patch_embed of floats": (
        lambda w, b, video: patch_embed(video.astype("float32"), w, b, *PATCH),
        [(96, 8), (8,), (2, 3, 8, 12, 3)],
    ),
}


def _run(op, arrays, dtype):
    """Every output of the op and the gradient of every input, as float32 or integers."""
    inputs = [paddle.to_tensor(array).astype(dtype).detach() for array in arrays]
    for tensor in inputs:
        tensor.stop_gradient = False
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    floats = [out.astype("float32") for out in outputs if out.dtype in kernels.SERVED_DTYPES]
    rng = np.random.default_rng(1)
    upstream = [paddle.to_tensor(rng.standard_normal(out.shape).astype(np.float32)) for out in floats]
    paddle.autograd.backward(floats, upstream)
    integers = [out.numpy() for out in outputs if out.dtype in kernels.INTEGER_DTYPES]
    return integers, [x.astype("float32").numpy() for x in (*floats, *(tensor.grad for tensor in inputs))]


@pytest.fixture(autouse=True)
def on_the_stand_in(monkeypatch):
    """Where the library believes that tensors lie on a GPU, so does the choice of kernels."""
    if cuda_stand_in.CALLED in os.environ:
        monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)
        monkeypatch.setattr(kernels.library(), "architectures", ("90",))


@pytest.mark.parametrize(("architectures", "served"), [((), frozenset()), (("90",), kernels.ON_GPU)])
def test_on_a_gpu_ours_are_the_ops_with_cuda_kernels(architectures, served, monkeypatch):
    monkeypatch.setattr(kernels.library(), "architectures", architectures)
    tensor = paddle.ones([2])
    monkeypatch.setattr(kernels, "on_gpu", lambda tensor: False)
    assert all(kernels.serves(name, tensor) for name in kernels.OPS if kernels.available(name))
    monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)
    assert {name for name in kernels.OPS if kernels.serves(name, tensor)} == served


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_equals_the_reference(name, dtype, monkeypatch):
    """The reference computes in float32, from inputs that were rounded to bfloat16 where the kernel gets those."""
    op, shapes = CASES[name]
    if dtype == "bfloat16" and name.startswith("route"):
        pytest.skip("routing is computed in float32")
    if name in ("swiglu", "add, cast, fork", "linear", "linear, transposed") and cuda_stand_in.CALLED in os.environ:
        pytest.skip("has no CUDA kernel")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    arrays = [paddle.to_tensor(array).astype(dtype).astype("float32").numpy() for array in arrays]
    integers, floats = _run(op, arrays, dtype)
    monkeypatch.setattr(kernels, "available", lambda name: False)
    wanted_integers, wanted = _run(op, arrays, "float32")
    for got, expected in zip(integers, wanted_integers, strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(floats, wanted, strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got / scale, expected / scale, atol=1e-5 if dtype == "float32" else 2e-2)
