"""AdamW and sum of squares over many tensors: names and meaning as in custom_ops/adamw/adamw.h."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p

import numpy as np

from tests.ops.harness._bfloat16 import from_bf16, to_bf16, unrounded

KINDS = ("f32", "bf16")
SIGNATURES = {
    **{f"ernie5_adamw_forward_cpu_{kind}": [c_int64] + [c_void_p] * 10 + [c_float] * 4 for kind in KINDS},
    **{f"ernie5_sum_of_squares_forward_cpu_{kind}": [c_int64] + [c_void_p] * 3 for kind in KINDS},
}
TOLERANCE = 1e-6
BETAS, EPSILON = (np.float32(0.9), np.float32(0.95)), np.float32(1e-8)

SIZES = [
    [],
    [0],
    [1],
    [0, 0, 17],
    [15, 0, 16, 31, 1],
    [16384],
    [16383, 16385, 7],
    [100_003, 128, 128, 50_000, 3],
    [12] * 3000,
    [40_000, 5, 40_000],
]


def cases(rng: np.random.Generator) -> list[dict]:
    return [_case(rng, sizes, kind, step) for sizes in SIZES for kind in KINDS for step in (1, 50)]


def _case(rng: np.random.Generator, sizes: list[int], kind: str, step: int) -> dict:
    def values(scale: float) -> list[np.ndarray]:
        return [(scale * rng.standard_normal(size)).astype(np.float32) for size in sizes]

    gradients = values(0.01)
    for gradient in gradients:
        gradient[::7] = 0.0
    first = values(0.01 if step > 1 else 0.0)
    return {
        "kind": kind,
        "parameters": values(1.0),
        "first": first,
        "second": [value * value for value in values(0.01 if step > 1 else 0.0)],
        "gradients": [from_bf16(to_bf16(value)) for value in gradients] if kind == "bf16" else gradients,
        "copied": rng.random(len(sizes)) < 0.5,
        "rates": (0.01 * rng.choice([0.5, 1.0], len(sizes))).astype(np.float32),
        "decays": (0.1 * rng.choice([0.0, 1.0], len(sizes))).astype(np.float32),
        "powers": [np.full(len(sizes), beta**step, np.float32) for beta in BETAS],
        "factor": np.float32(0.37 if step > 1 else 1.0),
    }


def _pointers(arrays: list[np.ndarray | None]) -> np.ndarray:
    return np.array([0 if array is None else array.ctypes.data for array in arrays], np.uint64)


def run(call: Callable, case: dict) -> dict[str, np.ndarray]:
    kind, tensors = case["kind"], len(case["parameters"])
    sizes = np.array([value.size for value in case["parameters"]], np.int64)
    state = {name: [value.copy() for value in case[name]] for name in ("parameters", "first", "second")}
    gradients = [to_bf16(value) if kind == "bf16" else value for value in case["gradients"]]
    copies = [np.full(n, 7, np.uint16) if wanted else None for n, wanted in zip(sizes, case["copied"], strict=True)]
    call(
        f"ernie5_adamw_forward_cpu_{kind}",
        tensors,
        sizes,
        *(_pointers(values) for values in state.values()),
        _pointers(gradients),
        _pointers(copies) if case["copied"].any() else None,
        case["rates"],
        case["decays"],
        *case["powers"],
        *map(float, (*BETAS, EPSILON, case["factor"])),
    )
    total = np.full(1, 7.0)
    call(f"ernie5_sum_of_squares_forward_cpu_{kind}", tensors, sizes, _pointers(gradients), total)
    result = {name: _joined(values) for name, values in state.items()}
    copied = _joined([from_bf16(copy) for copy in copies if copy is not None])
    copied = unrounded(copied, reference(case)["copied"], TOLERANCE)
    return {**_unit_sized(result), "copied": copied, "sum_of_squares": total}


def reference(case: dict) -> dict[str, np.ndarray]:
    betas = [float(beta) for beta in BETAS]
    result: dict[str, list] = {"parameters": [], "first": [], "second": [], "copied": []}
    for i, parameter in enumerate(case["parameters"]):
        gradient = float(case["factor"]) * case["gradients"][i].astype(np.float64)
        first = betas[0] * case["first"][i] + (1 - betas[0]) * gradient
        second = betas[1] * case["second"][i] + (1 - betas[1]) * gradient**2
        powers = [float(power[i]) for power in case["powers"]]
        rate, decay = float(case["rates"][i]), float(case["decays"][i])
        corrected = np.sqrt(second / (1 - powers[1])) + float(EPSILON)
        moved = parameter * (1 - rate * decay) - rate * (first / (1 - powers[0])) / corrected
        for name, value in zip(result, (moved, first, second, moved), strict=True):
            if name != "copied" or case["copied"][i]:
                result[name].append(value)
    squares = sum(float((value.astype(np.float64) ** 2).sum()) for value in case["gradients"])
    joined = {name: _joined(values) for name, values in result.items()}
    return {**_unit_sized(joined), "sum_of_squares": np.array([squares])}


def _unit_sized(result: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Moments in units of about their own size, since the tolerance is absolute for what is small."""
    return {**result, "first": result["first"] * 1e2, "second": result["second"] * 1e4}


def _joined(values: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *values])
