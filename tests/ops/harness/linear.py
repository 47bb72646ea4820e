"""Dense product of rows with a weight: shapes and names as in custom_ops/linear/linear.h."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_bool, c_int64, c_void_p

import numpy as np

from tests.ops.harness._bfloat16 import from_bf16, to_bf16, unrounded

KINDS = ("f32", "bf16")
SIZES = [c_int64] * 3 + [c_bool]
SIGNATURES = {
    **{f"ernie5_linear_forward_cpu_{kind}": [c_void_p] * 2 + SIZES + [c_void_p] for kind in KINDS},
    **{f"ernie5_linear_backward_cpu_{kind}": [c_void_p] * 3 + SIZES + [c_void_p] * 2 for kind in KINDS},
}
TOLERANCE = 1e-5
SHARED = ("x", "w", "grad_y")  # of the call's type

# R, D, O
SHAPES = [
    (0, 5, 7),
    (1, 1, 1),
    (1, 300, 517),
    (3, 64, 2048),
    (17, 31, 47),
    (64, 512, 96),
    (129, 401, 67),
    (203, 33, 389),
    (500, 128, 256),
    (550, 150, 1030),  # several blocks of the matrix unit
    (40, 1100, 70),  # and several pieces of the summed axis
]


def cases(rng: np.random.Generator) -> list[dict]:
    ways = [(kind, transposed) for kind in KINDS for transposed in (False, True)]
    return [_case(rng, *shape, *way) for shape in SHAPES for way in ways]


def _case(rng: np.random.Generator, rows: int, dim: int, out: int, kind: str, transposed: bool) -> dict:
    case = {
        "x": rng.standard_normal((rows, dim)),
        "w": rng.standard_normal((out, dim) if transposed else (dim, out)) / dim**0.5,
        "grad_y": rng.standard_normal((rows, out)) / out**0.5,
    }
    case = {name: value.astype(np.float32) for name, value in case.items()}
    if kind == "bf16":
        case = {name: from_bf16(to_bf16(value)) for name, value in case.items()}
    return {"kind": kind, "transposed": transposed, **case}


def run(call: Callable[..., object], case: dict) -> dict[str, np.ndarray]:
    kind, transposed = case["kind"], case["transposed"]
    x, w, grad_y = (to_bf16(case[name]) if kind == "bf16" else case[name] for name in SHARED)
    y, grad_x, grad_w = (np.full_like(like, 7) for like in (grad_y, x, w))
    sizes = (*x.shape, grad_y.shape[1], transposed)
    call(f"ernie5_linear_forward_cpu_{kind}", x, w, *sizes, y)
    call(f"ernie5_linear_backward_cpu_{kind}", x, w, grad_y, *sizes, grad_x, grad_w)
    result = {"y": y, "grad_x": grad_x, "grad_w": grad_w}
    if kind == "f32":
        return result
    wanted = reference(case)
    return {name: unrounded(from_bf16(value), wanted[name], TOLERANCE * 10) for name, value in result.items()}


def reference(case: dict) -> dict[str, np.ndarray]:
    x, w, grad_y = (case[name].astype(np.float64) for name in SHARED)
    if case["transposed"]:
        return {"y": x @ w.T, "grad_x": grad_y @ w, "grad_w": grad_y.T @ x}
    return {"y": x @ w, "grad_x": grad_y @ w.T, "grad_w": x.T @ grad_y}
