"""Cross entropy: shapes and names as in custom_ops/cross_entropy/cross_entropy.h."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64, c_void_p

import numpy as np

from tests.ops.harness._bfloat16 import from_bf16, to_bf16, unrounded

KINDS = ("f32", "bf16")
SIZES = [c_int64] * 2
SIGNATURES = {
    **{f"ernie5_cross_entropy_forward_cpu_{kind}": [c_void_p] * 2 + SIZES + [c_void_p] * 2 for kind in KINDS},
    **{f"ernie5_cross_entropy_backward_cpu_{kind}": [c_void_p] * 4 + SIZES + [c_void_p] for kind in KINDS},
}
TOLERANCE = 2e-5  # of a float32 log-sum: its rounding grows with the largest logit
IGNORED = -100

# N, V
SHAPES = [(0, 9), (1, 1), (1, 2), (7, 13), (40, 64), (33, 1031), (5, 8192), (3, 12289), (2000, 37), (65, 4096)]


def cases(rng: np.random.Generator) -> list[dict]:
    plain = [_case(rng, *shape, kind) for shape in SHAPES for kind in KINDS]
    return [*plain, _odd(rng), _large(rng)]


def _case(rng: np.random.Generator, rows: int, classes: int, kind: str) -> dict:
    logits = (3.0 * rng.standard_normal((rows, classes))).astype(np.float32)
    labels = rng.integers(0, classes, rows)
    return {
        "kind": kind,
        "logits": from_bf16(to_bf16(logits)) if kind == "bf16" else logits,
        "labels": np.where(rng.random(rows) < 0.2, IGNORED, labels),
        "grad_loss": rng.standard_normal(rows).astype(np.float32),
    }


def _odd(rng: np.random.Generator) -> dict:
    """Values and labels that are not to be trusted."""
    case = _case(rng, 9, 5000, "f32")
    case["labels"][:] = rng.integers(100, 200, 9)
    case["labels"][:3] = 5000, -1, IGNORED
    case["logits"][3, 4500] = np.nan
    case["logits"][4, :4200] = -np.inf  # the first chunk holds nothing
    case["labels"][4] = 4300
    case["logits"][5, 50] = np.inf
    case["logits"][6, 0] = -np.inf
    case["logits"][7] = -np.inf
    return case


def _large(rng: np.random.Generator) -> dict:
    case = _case(rng, 4, 9000, "f32")
    case["logits"] += np.array([[500.0], [-500.0], [80.0], [0.0]], np.float32)
    case["logits"][3, 8000] = 120.0  # all others vanish
    return case


def run(call: Callable, case: dict) -> dict[str, np.ndarray]:
    kind, (rows, classes) = case["kind"], case["logits"].shape
    logits = to_bf16(case["logits"]) if kind == "bf16" else case["logits"].copy()
    loss, lse = np.full(rows, 7.0, np.float32), np.full(rows, 7.0, np.float32)
    call(f"ernie5_cross_entropy_forward_cpu_{kind}", logits, case["labels"], rows, classes, loss, lse)
    grad = np.full_like(logits, 7)
    backward = f"ernie5_cross_entropy_backward_cpu_{kind}"
    call(backward, logits, case["labels"], lse, case["grad_loss"], rows, classes, grad)
    call(backward, logits, case["labels"], lse, case["grad_loss"], rows, classes, logits)
    np.testing.assert_array_equal(logits, grad, err_msg="the gradient in place of the logits differs")
    if kind == "bf16":
        grad = unrounded(from_bf16(grad), reference(case)["grad_logits"], TOLERANCE)
    return {"loss": loss, "lse": lse, "grad_logits": grad}


def reference(case: dict) -> dict[str, np.ndarray]:
    logits, labels = case["logits"].astype(np.float64), case["labels"]
    rows = np.arange(len(logits))
    with np.errstate(invalid="ignore", divide="ignore"):
        top = logits.max(1, initial=-np.inf)
        shift = np.where(top == -np.inf, 0.0, top)
        lse = shift + np.log(np.exp(logits - shift[:, None]).sum(1))
        known = (labels >= 0) & (labels < logits.shape[1])
        at = np.where(known, labels, 0)
        loss = np.where(known, lse - logits[rows, at], np.where(labels == IGNORED, 0.0, np.nan))
        grad = np.exp(logits - lse[:, None])
        grad[rows, at] -= 1.0
        grad *= case["grad_loss"].astype(np.float64)[:, None]
    grad[~(known & np.isfinite(lse))] = np.nan
    grad[labels == IGNORED] = 0.0
    return {"loss": loss, "lse": lse, "grad_logits": grad}
