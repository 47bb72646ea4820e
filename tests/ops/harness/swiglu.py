"""SwiGLU: shapes and names as in custom_ops/swiglu/swiglu.h."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64, c_void_p

import numpy as np

from tests.ops.harness.uni_rope import from_bf16, to_bf16

KINDS = ("f32", "bf16")
SIGNATURES = {f"ernie5_swiglu_forward_cpu_{t}": [c_void_p, c_int64, c_int64, c_void_p] for t in KINDS} | {
    f"ernie5_swiglu_backward_cpu_{t}": [c_void_p, c_void_p, c_int64, c_int64, c_void_p] for t in KINDS
}
TOLERANCE = 1e-5
ROUNDING = 2.0**-8  # of a bfloat16 value, relative
SHAPES = [(0, 4), (1, 1), (3, 16), (7, 17), (129, 31), (1031, 64), (2, 5003)]  # rows, width


def cases(rng: np.random.Generator) -> list[dict]:
    found = []
    for rows, width in SHAPES:
        for half in (False, True):
            hidden, grad = (rng.normal(0, 4, (rows, n)).astype(np.float32) for n in (2 * width, width))
            if half:
                hidden, grad = from_bf16(to_bf16(hidden)), from_bf16(to_bf16(grad))
            found.append({"hidden": hidden, "grad": grad, "half": half})
    return found


def run(call: Callable, case: dict) -> dict[str, np.ndarray]:
    kind, pack = ("bf16", to_bf16) if case["half"] else ("f32", np.copy)
    hidden, grad = pack(case["hidden"]), pack(case["grad"])
    out, grad_hidden = np.full_like(grad, 7), np.full_like(hidden, 7)
    call(f"ernie5_swiglu_forward_cpu_{kind}", hidden, *grad.shape, out)
    call(f"ernie5_swiglu_backward_cpu_{kind}", hidden, grad, *grad.shape, grad_hidden)
    found = {"out": out, "grad_hidden": grad_hidden}
    if not case["half"]:
        return found
    wanted = reference(case)
    found = {name: from_bf16(value) for name, value in found.items()}
    near = {name: ROUNDING * np.abs(value) + TOLERANCE for name, value in wanted.items()}
    return {n: np.where(np.abs(x - wanted[n]) <= near[n], wanted[n], x) for n, x in found.items()}


def reference(case: dict) -> dict[str, np.ndarray]:
    gate, up = np.split(case["hidden"].astype(np.float64), 2, axis=-1)
    sigmoid = 1 / (1 + np.exp(-gate))
    grad_gate = case["grad"] * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad = np.concatenate([grad_gate, case["grad"] * gate * sigmoid], axis=-1)
    return {"out": gate * sigmoid * up, "grad_hidden": grad}
