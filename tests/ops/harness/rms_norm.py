"""RMSNorm: shapes and names as in custom_ops/rms_norm/rms_norm.h."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p

import numpy as np

from tests.ops.harness._bfloat16 import from_bf16, to_bf16, unrounded

KINDS = ("f32", "bf16")
SIZES = [c_int64] * 2
FORWARD = [c_void_p] * 3 + SIZES + [c_float] + [c_void_p] * 3
SIGNATURES = {
    "ernie5_rms_norm_partial_size": SIZES,
    **{f"ernie5_rms_norm_forward_cpu_{kind}": FORWARD for kind in KINDS},
    **{f"ernie5_rms_norm_backward_cpu_{kind}": [c_void_p] * 5 + SIZES + [c_void_p] * 4 for kind in KINDS},
}
TOLERANCE = 5e-6
SHARED = ("x", "residual", "weight", "grad_y", "grad_sum")  # of the call's type

# R, D
SHAPES = [(0, 16), (1, 1), (1, 128), (5, 7), (33, 64), (64, 31), (1024, 128), (257, 512), (3, 8192), (9001, 17)]


def cases(rng: np.random.Generator) -> list[dict]:
    ways = [(kind, residual) for kind in KINDS for residual in (False, True)]
    return [_case(rng, *shape, *way) for shape in SHAPES for way in ways]


def _case(rng: np.random.Generator, rows: int, columns: int, kind: str, residual: bool) -> dict:
    case = {
        "kind": kind,
        "eps": np.float32(1e-5),
        "x": rng.standard_normal((rows, columns)) * rng.choice([0.01, 1.0, 30.0], (rows, 1)),
        "weight": 1.0 + 0.2 * rng.standard_normal(columns),
        "grad_y": rng.standard_normal((rows, columns)) / max(rows, 1) ** 0.5,
    }
    if residual:
        case["residual"] = rng.standard_normal((rows, columns))
        case["grad_sum"] = rng.standard_normal((rows, columns)) / max(rows, 1) ** 0.5
    for name in SHARED:
        if name in case:
            value = case[name].astype(np.float32)
            case[name] = from_bf16(to_bf16(value)) if kind == "bf16" else value
    return case


def run(call: Callable, case: dict) -> dict[str, np.ndarray]:
    kind, (rows, columns) = case["kind"], case["x"].shape
    pack, unpack = (to_bf16, from_bf16) if kind == "bf16" else (np.copy, np.copy)
    given = {name: pack(case[name]) if name in case else None for name in SHARED}
    residual = given["residual"] is not None

    def blank() -> np.ndarray:
        return np.full_like(given["x"], 7)

    y, total, inverse = blank(), blank() if residual else None, np.full(rows, 7.0, np.float32)
    how = (rows, columns, float(case["eps"]))
    call(f"ernie5_rms_norm_forward_cpu_{kind}", given["x"], given["residual"], given["weight"], *how, y, total, inverse)
    grad, grad_residual = blank(), blank() if residual else None
    grad_weight = np.full_like(given["weight"], 7)
    partial = np.full(int(call("ernie5_rms_norm_partial_size", rows, columns)), 7.0, np.float32)
    s = total if residual else given["x"]
    taken = (s, given["weight"], inverse, given["grad_y"], given["grad_sum"], rows, columns)
    call(f"ernie5_rms_norm_backward_cpu_{kind}", *taken, grad, grad_residual, grad_weight, partial)
    result = {"y": unpack(y), "inverse": inverse, "grad": unpack(grad), "grad_weight": unpack(grad_weight)}
    if residual:
        result |= {"sum": unpack(total), "grad_residual": unpack(grad_residual)}
    if kind == "bf16":
        wanted = reference(case)
        for name in result.keys() - {"inverse"}:
            result[name] = unrounded(result[name], wanted[name], TOLERANCE)
    return result


def reference(case: dict) -> dict[str, np.ndarray]:
    x, weight, grad = (case[name].astype(np.float64) for name in ("x", "weight", "grad_y"))
    if "residual" in case:
        total = (case["x"] + case["residual"]).astype(np.float32)
        x = (from_bf16(to_bf16(total)) if case["kind"] == "bf16" else total).astype(np.float64)
    inverse = 1.0 / np.sqrt((x * x).mean(1, keepdims=True) + float(case["eps"]))
    normed = x * inverse
    along = (grad * weight * normed).mean(1, keepdims=True)
    result = {
        "y": normed * weight,
        "inverse": inverse[:, 0],
        "grad": (grad * weight - normed * along) * inverse,
        "grad_weight": (grad * normed).sum(0),
    }
    if "residual" in case:
        result["grad"] = result["grad"] + case["grad_sum"]
        result |= {"sum": x, "grad_residual": result["grad"]}
    return result
