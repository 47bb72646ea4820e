"""Expert selection and permutation: shapes and names as in custom_ops/route/route.h."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p

import numpy as np

SIZES = [c_int64] * 3
SIGNATURES = {
    "ernie5_route_forward_cpu_f32": [c_void_p] * 3 + SIZES + [c_int, c_float] + [c_void_p] * 5,
    "ernie5_route_backward_cpu_f32": [c_void_p] * 3 + SIZES + [c_int, c_float, c_void_p],
    "ernie5_permute_forward_cpu": [c_void_p] + SIZES + [c_void_p] * 3,
}
TOLERANCE = 2e-6
SMALLEST_SUM = 1e-12

# T, E, K
SHAPES = [
    (0, 8, 2),
    (1, 1, 1),
    (1, 32, 2),
    (5, 7, 7),
    (17, 13, 3),
    (64, 16, 1),
    (101, 37, 5),
    (1024, 32, 2),
    (523, 64, 4),
    (2049, 256, 8),
    (31, 511, 6),
    (33, 512, 8),
    (19, 513, 4),
    (16, 64, 64),
    (11, 97, 65),
    (7, 4096, 8),
    (3, 4096, 300),
    (6000, 40, 3),
]


def cases(rng: np.random.Generator) -> list[dict]:
    plain = [_case(rng, *shape, softmax) for shape in SHAPES for softmax in (False, True)]
    return [*plain, *_ties(rng), *_not_finite(rng), _clipped(rng)]


def _case(rng: np.random.Generator, tokens: int, experts: int, top_k: int, softmax: bool) -> dict:
    return {
        "logits": rng.standard_normal((tokens, experts)).astype(np.float32),
        "bias": (0.1 * rng.standard_normal(experts)).astype(np.float32),
        "valid": (rng.random(tokens) < 0.9).astype(np.uint8),
        "top_k": top_k,
        "softmax": softmax,
        "scale": np.float32(2.5),
        "grad": rng.standard_normal((tokens, top_k)).astype(np.float32),
    }


def _ties(rng: np.random.Generator) -> list[dict]:
    found = []
    for tokens, experts, top_k in ((50, 24, 4), (9, 600, 8), (8, 100, 70)):
        case = _case(rng, tokens, experts, top_k, False)
        case["logits"] = np.round(case["logits"])
        case["bias"][:] = 0.0
        found.append(case)
    found[0]["valid"][:] = 0  # nothing is routed at all
    all_on_one = _case(rng, 300, 16, 1, False)
    all_on_one["bias"][5] = 10.0
    return [*found, all_on_one]


def _not_finite(rng: np.random.Generator) -> list[dict]:
    found = []
    for tokens, experts, top_k in ((20, 8, 3), (20, 600, 3), (20, 90, 66)):
        case = _case(rng, tokens, experts, top_k, False)
        case["logits"][3] = np.nan
        case["logits"][4, 2:] = np.nan
        case["logits"][5, 1] = -np.inf
        case["logits"][6, 4] = np.inf
        case["bias"][experts // 2] = -np.inf
        case["valid"][:8] = 1
        found.append(case)
    return found


def _clipped(rng: np.random.Generator) -> dict:
    case = _case(rng, 10, 8, 2, False)
    case["logits"] -= 40.0  # the scores of a token sum to less than the smallest divisor
    return case


def run(call: Callable, case: dict) -> dict[str, np.ndarray]:
    tokens, experts = case["logits"].shape
    sizes = (tokens, experts, case["top_k"])
    how = (int(case["softmax"]), float(case["scale"]))
    out = _buffers(*sizes)
    call("ernie5_route_forward_cpu_f32", case["logits"], case["bias"], case["valid"], *sizes, *how, *out.values())
    again = _buffers(*sizes)
    names = ("counts", "order", "offsets")
    call("ernie5_permute_forward_cpu", out["experts"], *sizes, *(again[name] for name in names))
    grad = np.full((tokens, experts), 7.0, np.float32)
    call("ernie5_route_backward_cpu_f32", case["logits"], out["experts"], case["grad"], *sizes, *how, grad)
    return {**out, **{f"permuted_{name}": again[name] for name in names}, "grad_logits": grad}


def _buffers(tokens: int, experts: int, top_k: int) -> dict[str, np.ndarray]:
    return {
        "experts": np.full((tokens, top_k), -7, np.int32),
        "weights": np.full((tokens, top_k), 7.0, np.float32),
        "counts": np.full(experts, -7, np.int64),
        "order": np.full(tokens * top_k, -7, np.int32),
        "offsets": np.full(experts + 1, -7, np.int32),
    }


def reference(case: dict) -> dict[str, np.ndarray]:
    logits, valid, top_k = case["logits"].astype(np.float64), case["valid"].astype(bool), case["top_k"]
    with np.errstate(over="ignore", invalid="ignore"):
        scores = _scores(logits, case["softmax"])
        keys = scores.astype(np.float32) + case["bias"] if np.isnan(logits).any() else scores + case["bias"]
        experts = np.argsort(-np.where(np.isnan(keys), -np.inf, keys), axis=1, kind="stable")[:, :top_k]
        chosen = np.take_along_axis(scores, experts, 1)
        divisor = np.maximum(chosen.sum(1, keepdims=True), SMALLEST_SUM)
        weights = np.where(valid[:, None], chosen * float(case["scale"]) / divisor, 0.0)
        grad = _gradient(case, scores, experts, divisor)
    experts = np.where(valid[:, None], experts, -1).astype(np.int32)
    permuted = _permutation(experts, logits.shape[1])
    return {
        "experts": experts,
        "weights": weights,
        **permuted,
        **{f"permuted_{name}": value for name, value in permuted.items()},
        "grad_logits": np.where(valid[:, None], grad, 0.0),
    }


def _scores(logits: np.ndarray, softmax: bool) -> np.ndarray:
    if not softmax:
        return 1.0 / (1.0 + np.exp(-logits))
    power = np.exp(logits - logits.max(1, keepdims=True))
    return power / power.sum(1, keepdims=True)


def _gradient(case: dict, scores: np.ndarray, experts: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    grad, chosen = case["grad"].astype(np.float64), np.take_along_axis(scores, experts, 1)
    passes = chosen.sum(1, keepdims=True) >= SMALLEST_SUM
    passes |= np.isnan(chosen.sum(1, keepdims=True))
    along = np.where(passes, (grad * chosen).sum(1, keepdims=True) / divisor, 0.0)
    of_scores = np.zeros_like(scores)
    np.put_along_axis(of_scores, experts, float(case["scale"]) * (grad - along) / divisor, 1)
    if case["softmax"]:
        return scores * (of_scores - (of_scores * scores).sum(1, keepdims=True))
    return np.where(of_scores == 0.0, 0.0, of_scores * scores * (1.0 - scores))


def _permutation(experts: np.ndarray, num_experts: int) -> dict[str, np.ndarray]:
    flat = experts.flatten()
    order = np.argsort(np.where(flat < 0, num_experts, flat), kind="stable")
    counts = np.bincount(flat[flat >= 0], minlength=num_experts)
    order = np.where(np.arange(flat.size) < counts.sum(), order, -1)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return {"counts": counts, "order": order, "offsets": offsets}
