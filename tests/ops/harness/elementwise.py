"""Sums and conversions: shapes and names as in custom_ops/elementwise/elementwise.h."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64, c_void_p

import numpy as np

from tests.ops.harness._bfloat16 import from_bf16, to_bf16

SIGNATURES = {
    **{f"ernie5_sum_forward_cpu_{kind}": [c_void_p, c_int64, c_int64, c_void_p] for kind in ("f32", "bf16")},
    "ernie5_widen_forward_cpu": [c_void_p, c_int64, c_void_p],
    "ernie5_narrow_forward_cpu": [c_void_p, c_int64, c_void_p],
}
TOLERANCE = 1e-6
SIZES = [0, 1, 16, 47, 5003, 70001]


def cases(rng: np.random.Generator) -> list[dict]:
    """``values`` [count, size] for sums, whose bfloat16 ones are small integers and so exact, and for conversions."""
    found = [{"what": "widen", "values": rng.standard_normal((1, size)).astype(np.float32)} for size in SIZES]
    found += [{**case, "what": "narrow"} for case in found]
    for size in SIZES:
        for count in (1, 2, 4):
            found.append({"what": "f32", "values": rng.standard_normal((count, size)).astype(np.float32)})
            whole = rng.integers(-30, 30, (count, size)).astype(np.float32)
            found.append({"what": "bf16", "values": whole})
    return found


def run(call: Callable, case: dict) -> dict[str, np.ndarray]:
    what, values = case["what"], case["values"]
    size = values.shape[1]
    if what == "widen":
        out, given = np.full(size, 7, np.float32), to_bf16(values[0])
        call("ernie5_widen_forward_cpu", given, size, out)
        return {"out": out}
    if what == "narrow":
        out = to_bf16(np.full(size, 7, np.float32))
        call("ernie5_narrow_forward_cpu", values[0], size, out)
        return {"out": from_bf16(out)}
    parts = [to_bf16(row) if what == "bf16" else np.ascontiguousarray(row) for row in values]
    out = np.full_like(parts[0], 7)
    call(f"ernie5_sum_forward_cpu_{what}", np.array([part.ctypes.data for part in parts]), len(parts), size, out)
    return {"out": from_bf16(out) if what == "bf16" else out}


def reference(case: dict) -> dict[str, np.ndarray]:
    if case["what"] in ("widen", "narrow"):
        return {"out": from_bf16(to_bf16(case["values"][0]))}
    return {"out": case["values"].astype(np.float64).sum(0)}
