"""Grouped and dense SwiGLU feed-forward: shapes and names as in custom_ops/moe_ffn/moe_ffn.h."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64, c_void_p

import numpy as np

from tests.ops.harness._bfloat16 import from_bf16, to_bf16, unrounded

KINDS = ("f32", "bf16")
FORWARD = [c_void_p] * 6 + [c_int64] * 5 + [c_void_p] * 3
BACKWARD = [c_void_p] * 8 + [c_int64] * 5 + [c_void_p] * 6
DENSE_FORWARD = [c_void_p] * 3 + [c_int64] * 3 + [c_void_p] * 2
DENSE_BACKWARD = [c_void_p] * 5 + [c_int64] * 3 + [c_void_p] * 4
SIGNATURES = {
    **{f"ernie5_moe_ffn_forward_cpu_{kind}": FORWARD for kind in KINDS},
    **{f"ernie5_moe_ffn_backward_cpu_{kind}": BACKWARD for kind in KINDS},
    **{f"ernie5_dense_ffn_forward_cpu_{kind}": DENSE_FORWARD for kind in KINDS},
    **{f"ernie5_dense_ffn_backward_cpu_{kind}": DENSE_BACKWARD for kind in KINDS},
}
TOLERANCE = 5e-6
HALVES = 1e-2  # what the bfloat16 roundings between the products add up to, of the largest value
SHARED = ("x", "gate_up", "down", "grad_y")  # of the call's type

# tokens, top_k, dim, experts, width; the last entry says who is chosen.
SHAPES = [
    (0, 2, 8, 3, 4, "random"),
    (5, 1, 1, 1, 1, "random"),
    (7, 2, 16, 4, 16, "random"),
    (13, 3, 31, 5, 17, "random"),
    (40, 2, 33, 7, 29, "random"),
    (64, 2, 64, 4, 32, "random"),
    (101, 4, 48, 16, 40, "padded"),
    (9, 2, 32, 4, 16, "nobody"),
    (50, 2, 64, 61, 16, "random"),
    (331, 2, 67, 4, 37, "one"),
    (640, 1, 96, 3, 160, "one"),
    (430, 2, 67, 8, 69, "random"),  # tiles of the matrix unit that are not full, in every direction
    (2700, 1, 65, 9, 290, "random"),  # experts that are split, their gradients of weights in blocks of either size
]


def _routing(rng: np.random.Generator, tokens: int, top_k: int, experts: int, who: str):
    """order int32 [T*K] and offsets int32 [E+1] of a random choice; -1 where ``who`` leaves tokens out."""
    chosen = rng.integers(0, experts, (tokens, top_k))
    if who == "one":
        chosen[:] = experts // 2
    if who == "padded":
        chosen[rng.random(tokens) < 0.3] = -1
    if who == "nobody":
        chosen[:] = -1
    return grouped(chosen.reshape(-1), experts)


def grouped(chosen: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """order and offsets of the assignments, whose experts (-1: none) are ``chosen``."""
    order = np.argsort(np.where(chosen < 0, experts, chosen), kind="stable")
    offsets = np.concatenate([[0], np.cumsum([(chosen == e).sum() for e in range(experts)])])
    order[int(offsets[-1]) :] = -1
    return order.astype(np.int32), offsets.astype(np.int32)


def cases(rng: np.random.Generator) -> list[dict]:
    return [_case(rng, kind, *shape) for kind in KINDS for shape in SHAPES]


def _case(
    rng: np.random.Generator, kind: str, tokens: int, top_k: int, dim: int, experts: int, width: int, who: str
) -> dict:
    case = {
        "x": rng.standard_normal((tokens, dim)),
        "gate_up": rng.standard_normal((experts, dim, 2 * width)) / dim**0.5,
        "down": rng.standard_normal((experts, width, dim)) / width**0.5,
        "grad_y": rng.standard_normal((tokens, dim)),
    }
    case = {name: value.astype(np.float32) for name, value in case.items()}
    if kind == "bf16":
        case = {name: from_bf16(to_bf16(value)) for name, value in case.items()}
    order, offsets = _routing(rng, tokens, top_k, experts, who)
    weights = rng.random((tokens, top_k), dtype=np.float32)
    return {"kind": kind, "weights": weights, "order": order, "offsets": offsets, **case}


def run(call: Callable[..., object], case: dict) -> dict[str, np.ndarray]:
    given, blank = typed(case)
    result = _run_grouped(call, case, given, blank) | _run_dense(call, case["kind"], given, blank)
    return compared(case["kind"], result, reference(case))


def typed(case: dict) -> tuple[dict[str, np.ndarray], Callable]:
    """The inputs of the call's type, and what makes outputs of it, full of sevens."""
    given = {name: to_bf16(case[name]) if case["kind"] == "bf16" else case[name] for name in SHARED}
    return given, lambda *shape: np.full(shape, 7, given["x"].dtype)


def compared(kind: str, result: dict, wanted: dict) -> dict[str, np.ndarray]:
    """``result`` without the roundings that bfloat16 may have."""
    if kind == "f32":
        return result
    result = {name: from_bf16(value) if value.dtype == np.uint16 else value for name, value in result.items()}
    slack = {name: HALVES * max(1.0, float(np.abs(value).max(initial=0.0))) for name, value in wanted.items()}
    return {name: unrounded(value, wanted[name], slack[name]) for name, value in result.items()}


def _run_grouped(call: Callable, case: dict, given: dict, blank: Callable) -> dict[str, np.ndarray]:
    kind, (x, gate_up, down, grad_y) = case["kind"], given.values()
    (tokens, dim), (experts, width), top_k = x.shape, down.shape[:2], case["weights"].shape[1]
    inputs = (x, case["weights"], case["order"], case["offsets"], gate_up, down)
    sizes = (tokens, top_k, dim, experts, width)
    rows = tokens * top_k
    y, hidden, scratch, work = blank(*x.shape), blank(rows, 2 * width), blank(rows, dim), blank(rows, 3 * width + 64)
    call(f"ernie5_moe_ffn_forward_cpu_{kind}", *inputs, *sizes, y, hidden, scratch)
    grads = {
        "grad_x": blank(*x.shape),
        "grad_weights": np.full((tokens, top_k), 7.0, np.float32),
        "grad_gate_up": blank(*gate_up.shape),
        "grad_down": blank(*down.shape),
    }
    call(f"ernie5_moe_ffn_backward_cpu_{kind}", *inputs, hidden, grad_y, *sizes, *grads.values(), scratch, work)
    inference = blank(*x.shape)
    call(f"ernie5_moe_ffn_forward_cpu_{kind}", *inputs, *sizes, inference, None, scratch)
    np.testing.assert_array_equal(inference, y)
    return {"y": y, **grads}


def _run_dense(call: Callable, kind: str, given: dict, blank: Callable) -> dict[str, np.ndarray]:
    x, gate_up, down, grad_y = given.values()
    weights, sizes = (gate_up[0], down[0]), (*x.shape, down.shape[1])
    y, hidden, work = blank(*x.shape), blank(len(x), 2 * sizes[2]), blank(len(x), 3 * sizes[2] + 64)
    call(f"ernie5_dense_ffn_forward_cpu_{kind}", x, *weights, *sizes, y, hidden)
    grads = {
        "dense_grad_x": blank(*x.shape),
        "dense_grad_gate_up": blank(*gate_up.shape[1:]),
        "dense_grad_down": blank(*down.shape[1:]),
    }
    call(f"ernie5_dense_ffn_backward_cpu_{kind}", x, *weights, hidden, grad_y, *sizes, *grads.values(), work)
    return {"dense_y": y, **grads}


def _expert(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray, grad: np.ndarray):
    """Output rows of one expert and the gradients of x, gate_up and down for the output gradient ``grad``."""
    gate, up = np.split(x @ gate_up, 2, axis=1)
    sigmoid = 1.0 / (1.0 + np.exp(-gate))
    active = gate * sigmoid * up
    grad_active = grad @ down.T
    grad_gate = grad_active * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_hidden = np.concatenate([grad_gate, grad_active * gate * sigmoid], axis=1)
    return active @ down, grad_hidden @ gate_up.T, x.T @ grad_hidden, active.T @ grad


def reference(case: dict) -> dict[str, np.ndarray]:
    x, gate_up, down, grad_y, weights = (
        case[name].astype(np.float64) for name in ("x", "gate_up", "down", "grad_y", "weights")
    )
    top_k = weights.shape[1]
    result = {"y": np.zeros_like(x), "grad_x": np.zeros_like(x), "grad_weights": np.zeros_like(weights)}
    result |= {"grad_gate_up": np.zeros_like(gate_up), "grad_down": np.zeros_like(down)}
    offsets = case["offsets"]
    for e in range(gate_up.shape[0]):
        assignments = case["order"][offsets[e] : offsets[e + 1]]
        tokens, slots = assignments // top_k, assignments % top_k
        weight = weights[tokens, slots][:, None]
        rows, grad_rows, result["grad_gate_up"][e], result["grad_down"][e] = _expert(
            x[tokens], gate_up[e], down[e], grad_y[tokens] * weight
        )
        np.add.at(result["y"], tokens, rows * weight)
        np.add.at(result["grad_x"], tokens, grad_rows)
        result["grad_weights"][tokens, slots] = (rows * grad_y[tokens]).sum(1)
    dense = _expert(x, gate_up[0], down[0], grad_y)
    names = ("dense_y", "dense_grad_x", "dense_grad_gate_up", "dense_grad_down")
    return result | dict(zip(names, dense, strict=True))
