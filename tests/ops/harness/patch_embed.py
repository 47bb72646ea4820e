"""Patch embedding: shapes and names as in custom_ops/patch_embed/patch_embed.h."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64, c_void_p

import numpy as np

from tests.ops.harness._bfloat16 import from_bf16, to_bf16, unrounded

FORWARD, SIZES = [c_void_p] * 6, [c_int64] * 10
SIGNATURES = {
    **{f"ernie5_patch_embed_forward_cpu_{v}_{w}": FORWARD + SIZES for v in ("u8", "f32") for w in ("f32", "bf16")},
    **{f"ernie5_patch_embed_backward_cpu_u8_{w}": [c_void_p] * 6 + SIZES for w in ("f32", "bf16")},
    **{f"ernie5_patch_embed_backward_cpu_f32_{w}": [c_void_p] * 8 + SIZES for w in ("f32", "bf16")},
}
TOLERANCE = 2e-5

# B, T, H, W, C, pt, ph, pw, lead, D
SHAPES = [
    (0, 1, 4, 4, 3, 1, 4, 4, 0, 8),  # no clip
    (2, 0, 4, 4, 3, 2, 4, 4, 1, 8),  # no frame
    (1, 2, 0, 4, 3, 1, 2, 2, 0, 5),  # no row
    (1, 2, 4, 4, 3, 1, 2, 2, 0, 0),  # no output
    (1, 2, 4, 4, 0, 1, 2, 2, 0, 3),  # no channel: the bias alone
    (1, 1, 1, 1, 1, 1, 1, 1, 0, 1),
    (1, 1, 4, 4, 3, 2, 4, 4, 1, 16),  # an image behind a missing frame
    (2, 5, 8, 12, 3, 2, 4, 4, 1, 33),  # the first frame alone
    (2, 4, 6, 9, 2, 3, 2, 3, 2, 48),  # missing frames on both sides
    (1, 7, 5, 10, 3, 3, 5, 5, 0, 17),  # a clip that goes on, missing frames behind it
    (1, 2, 7, 7, 1, 4, 7, 7, 1, 64),  # one patch that lacks frames on both sides
    (3, 3, 14, 28, 3, 1, 14, 14, 0, 31),
    (1, 3, 13, 11, 5, 3, 13, 11, 1, 13),  # primes, one patch a time
    (2, 2, 6, 34, 3, 2, 3, 17, 1, 97),
    (1, 9, 56, 56, 3, 2, 4, 4, 1, 40),  # more tokens than one task holds
    (37, 1, 32, 32, 3, 1, 8, 8, 0, 100),
    (5, 1, 1, 1024, 1, 1, 1, 1, 0, 2),  # rows of one value
]


def cases(rng: np.random.Generator) -> list[dict]:
    return [
        _case(rng, dict(zip(("B", "T", "H", "W", "C", "pt", "ph", "pw", "lead", "D"), shape, strict=True)), kind)
        for shape in SHAPES
        for kind in ("u8_f32", "f32_f32", "u8_bf16", "f32_bf16")
    ]


def _case(rng: np.random.Generator, sizes: dict[str, int], kind: str) -> dict:
    shape = [sizes[name] for name in "BTHWC"]
    depth, width = sizes["pt"] * sizes["ph"] * sizes["pw"] * sizes["C"], sizes["D"]
    floats = rng.standard_normal(shape).astype(np.float32)
    case = {
        "kind": kind,
        "sizes": sizes,
        "video": rng.integers(0, 256, shape).astype(np.uint8) if kind.startswith("u8") else floats,
        "weight": (rng.standard_normal((depth, width)) * max(depth, 1) ** -0.5).astype(np.float32),
        "bias": rng.standard_normal(width).astype(np.float32),
        "mean": rng.uniform(0.3, 0.6, sizes["C"]).astype(np.float32),
        "deviation": rng.uniform(0.2, 0.4, sizes["C"]).astype(np.float32),
        "tokens_grad": rng.standard_normal((sizes["B"], _tokens(sizes), width)).astype(np.float32),
    }
    if kind.endswith("bf16"):
        for name in ("weight", "bias", "tokens_grad"):
            case[name] = from_bf16(to_bf16(case[name]))
    return case


def _times(sizes: dict[str, int]) -> int:
    return -(-(sizes["lead"] + sizes["T"]) // sizes["pt"]) if sizes["T"] else 0


def _tokens(sizes: dict[str, int]) -> int:
    return _times(sizes) * (sizes["H"] // sizes["ph"]) * (sizes["W"] // sizes["pw"])


def run(call: Callable, case: dict) -> dict[str, np.ndarray]:
    half, sizes, video = case["kind"].endswith("bf16"), list(case["sizes"].values()), case["video"]
    pack, unpack = (to_bf16, from_bf16) if half else (np.copy, np.copy)
    weight, bias, tokens_grad = (pack(case[name]) for name in ("weight", "bias", "tokens_grad"))
    moments = (case["mean"], case["deviation"])
    tokens, weight_grad, bias_grad = (np.full_like(x, 7) for x in (tokens_grad, weight, bias))
    call(f"ernie5_patch_embed_forward_cpu_{case['kind']}", video, weight, bias, *moments, tokens, *sizes)
    backward, parameters = f"ernie5_patch_embed_backward_cpu_{case['kind']}", (weight_grad, bias_grad)
    result = {"tokens": tokens, "weight_grad": weight_grad, "bias_grad": bias_grad}
    if video.dtype == np.uint8:
        call(backward, video, tokens_grad, *moments, *parameters, *sizes)
        return _unrounded({name: unpack(value) for name, value in result.items()}, case)
    video_grad, again = np.full_like(video, 7), [np.full_like(x, 7) for x in parameters]
    call(backward, video, weight, tokens_grad, *moments, *parameters, video_grad, *sizes)
    call(backward, video, weight, tokens_grad, *moments, *again, None, *sizes)
    np.testing.assert_array_equal(weight_grad, again[0], err_msg="the video's gradient changes the weight's")
    result = _unrounded({name: unpack(value) for name, value in result.items()}, case)
    return {**result, "video_grad": video_grad}


def _unrounded(result: dict[str, np.ndarray], case: dict) -> dict[str, np.ndarray]:
    """A bfloat16 value that is a rounding of the reference's stands for it."""
    if not case["kind"].endswith("bf16"):
        return result
    wanted = reference(case)
    return {name: unrounded(value, wanted[name], TOLERANCE) for name, value in result.items()}


def reference(case: dict) -> dict[str, np.ndarray]:
    s, video = case["sizes"], case["video"].astype(np.float64)
    mean, deviation = case["mean"].astype(np.float64), case["deviation"].astype(np.float64)
    unit = 255.0 if case["kind"].startswith("u8") else 1.0
    frames = _times(s) * s["pt"]
    padded = np.zeros((s["B"], frames, s["H"], s["W"], s["C"]))
    lead = s["lead"] if s["T"] else 0
    padded[:, lead : lead + s["T"]] = (video / unit - mean) / deviation
    grid = (s["B"], _times(s), s["pt"], s["H"] // s["ph"], s["ph"], s["W"] // s["pw"], s["pw"], s["C"])
    order = (0, 1, 3, 5, 2, 4, 6, 7)
    weight, grad = case["weight"].astype(np.float64), case["tokens_grad"].astype(np.float64)
    matrix = padded.reshape(grid).transpose(order).reshape(s["B"], _tokens(s), len(weight))
    result = {
        "tokens": matrix @ weight + case["bias"],
        "weight_grad": np.einsum("btk,btd->kd", matrix, grad, optimize=True),
        "bias_grad": grad.sum((0, 1)),
    }
    if unit == 1.0:
        cells = (grad @ weight.T).reshape([grid[axis] for axis in order])
        whole = cells.transpose(np.argsort(order)).reshape(padded.shape)
        result["video_grad"] = whole[:, lead : lead + s["T"]] / deviation
    return result
