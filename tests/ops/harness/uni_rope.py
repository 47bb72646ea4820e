"""Uni-RoPE: shapes and names as in custom_ops/uni_rope/uni_rope.h."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p

import numpy as np

SIGNATURES = {
    f"ernie5_uni_rope_cpu_{t}": [c_void_p] * 4 + [c_int64] * 4 + [c_float] + [c_void_p] * 2 for t in ("f32", "bf16")
}
TOLERANCE = 2e-6
ROUNDING = 2.0**-8  # of a bfloat16 value, relative

# positions, N, G, h
SHAPES = [
    (0, 2, 1, 8),
    (1, 1, 1, 2),
    (3, 0, 2, 16),  # keys alone
    (7, 3, 1, 6),
    (13, 4, 2, 32),
    (31, 5, 5, 34),
    (67, 8, 2, 64),
    (101, 2, 1, 128),
    (5, 1, 1, 514),
    (257, 4, 2, 80),
]


def cases(rng: np.random.Generator) -> list[dict]:
    return [_case(rng, shape, half) for shape in SHAPES for half in (False, True)]


def _case(rng: np.random.Generator, shape: tuple[int, ...], half: bool) -> dict:
    positions, heads, groups, dim = shape
    angles = rng.uniform(-40, 40, (positions, dim // 2))
    case = {"sizes": shape, "half": half}
    case |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    for name, count in (("q", heads), ("k", groups)):
        values = rng.standard_normal((positions, count, dim)).astype(np.float32)
        case[name] = from_bf16(to_bf16(values)) if half else values
    return case


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even, as uint16."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def run(call: Callable, case: dict) -> dict[str, np.ndarray]:
    kind, pack, unpack = ("bf16", to_bf16, from_bf16) if case["half"] else ("f32", np.copy, np.copy)
    q, k = pack(case["q"]), pack(case["k"])
    result = {}
    for turn, sign in (("forward", 1.0), ("back", -1.0)):
        results = np.full_like(q, 7), np.full_like(k, 7)
        call(f"ernie5_uni_rope_cpu_{kind}", q, k, case["cos"], case["sin"], *case["sizes"], sign, *results)
        in_place = q.copy(), k.copy()
        call(f"ernie5_uni_rope_cpu_{kind}", *in_place, case["cos"], case["sin"], *case["sizes"], sign, *in_place)
        for name, value, same in zip(("q", "k"), results, in_place, strict=True):
            np.testing.assert_array_equal(value, same, err_msg=f"{turn} {name} in place")
            result[f"{name}_{turn}"] = unpack(value)
    return _unrounded(result, reference(case)) if case["half"] else result


def _unrounded(result: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A bfloat16 value that is a rounding of the reference's stands for it."""
    near = {name: ROUNDING * np.abs(wanted[name]) + TOLERANCE for name in result}
    return {name: np.where(np.abs(x - wanted[name]) <= near[name], wanted[name], x) for name, x in result.items()}


def reference(case: dict) -> dict[str, np.ndarray]:
    turn = case["cos"].astype(np.float64) + 1j * case["sin"].astype(np.float64)
    result = {}
    for name in ("q", "k"):
        x = case[name].astype(np.float64)
        pairs = x[..., 0::2] + 1j * x[..., 1::2]
        for direction, factor in (("forward", turn), ("back", turn.conj())):
            turned = pairs * factor[:, None]
            out = np.empty_like(x)
            out[..., 0::2], out[..., 1::2] = turned.real, turned.imag
            result[f"{name}_{direction}"] = out
    return result
