"""Text written by the decoding kernel: shapes and names as in custom_ops/decode_step/decode_step.h.

The reference walks the float64 one of ``decode_step`` and chooses by sorting; a case where it is a matter of rounding
which token comes next would be found by its distance to the edge (``_choose``).
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_double, c_int64, c_void_p

import numpy as np

from tests.ops.harness import decode_step

SIGNATURES = {
    "ernie5_decode_text_cpu": [
        *[c_void_p] * 5,
        c_int64,
        c_void_p,
        *[c_int64] * 4,
        *[c_void_p] * 2,
        *[c_int64] * 3,
        c_double,
        c_int64,
        c_double,
        *[c_void_p] * 6,
    ],
}
TOLERANCE = 1e-4
END, EDGE = 2, 1e-4

# batch, past, tokens to write, V, W; temperature, top_k, top_p; half, ending (END is likely)
CASES = [
    ((1, 4, 9, 40, 40), (0.0, 0, 1.0), ""),
    ((3, 0, 7, 67, 61), (0.0, 0, 1.0), "half"),
    ((0, 2, 3, 20, 20), (0.0, 0, 1.0), ""),
    ((2, 5, 12, 33, 33), (0.0, 0, 1.0), "ending"),
    ((5, 17, 6, 129, 129), (1.0, 0, 1.0), "half"),
    ((2, 3, 8, 500, 490), (0.7, 5, 1.0), ""),
    ((3, 9, 8, 500, 500), (1.3, 0, 0.6), "ending"),
    ((1, 1, 16, 300, 300), (2.0, 100, 0.9), ""),
]


def cases(rng: np.random.Generator) -> list[dict]:
    return [_case(rng, *parts) for parts in CASES]


def _case(rng: np.random.Generator, sizes: tuple, sampling: tuple, special: str) -> dict:
    batch, past, count, vocabulary, width = sizes
    model = dict(zip(decode_step.NAMES, (batch, 1, past, 48, 4, 2, 8, 6, 2, 20, 8, vocabulary, 2), strict=True))
    case = decode_step._case(rng, model, ["text", *(["half"] if "half" in special else [])])
    rows = past + count
    case["cache"] = rng.standard_normal((2, 2, batch, rows, 2, 8)).astype(np.float32)
    case["intervals"] = decode_step._intervals(rng, batch, rows)
    case["positions"] = rng.uniform(0, 50, (batch, rows, 3)).astype(np.float32)
    case["valid"] = (rng.random((batch, rows)) < 0.8).astype(np.uint8)
    if "ending" in special:
        case["embedding"][END] = 0  # its logit is 0, in the middle of the others
        case["embedding"][::3] *= -1
    case["ids"] = rng.integers(3, vocabulary, (batch, 1))
    missing = rng.choice([0, 0, 0, 1, 2, 255], (4, width)).astype(np.uint8)
    missing[:, END] = 0 if "ending" in special else 255
    missing[:, -1] = 0
    following = rng.integers(0, 4, (4, width)).astype(np.uint8)
    states = rng.integers(0, 4, batch)
    text = {"count": count, "missing": missing, "following": following, "states": states, "sampling": sampling}
    return {**case, **text, "uniforms": rng.random((batch, count))}


def run(call: Callable, case: dict) -> dict[str, np.ndarray]:
    s, count = case["sizes"], case["count"]
    model, kept = decode_step._plan(case)
    cache, ids, states = case["cache"].copy(), case["ids"][:, 0].copy(), case["states"].copy()
    addresses = [part.ctypes.data for layer in cache for part in layer]
    table = np.array([s["B"], cache.shape[3], *addresses], np.int64)
    chosen, written = np.full((s["B"], count), -1), np.zeros(1, np.int64)
    work = np.empty((s["B"], s["D"]), np.float32), np.empty((s["B"], s["V"]), np.float32)
    here = np.ascontiguousarray(case["positions"]).ravel()[3 * s["past"] :]
    valid = case["valid"].ravel()[s["past"] :]
    rows = case["positions"].shape[1]
    temperature, top_k, top_p = case["sampling"]
    rule = case["following"], case["missing"], case["missing"].shape[1], END, count - 1, temperature, top_k, top_p
    given = here, case["intervals"], rows, valid, s["B"], rows, s["past"], count
    failed = call(
        "ernie5_decode_text_cpu", model, table, ids, *given, *rule, case["uniforms"], states, chosen, *work, written
    )
    assert not failed and kept
    return {"chosen": chosen[:, : written[0]], "states": states}


def reference(case: dict) -> dict[str, np.ndarray]:
    count, past, states = case["count"], case["sizes"]["past"], case["states"].copy()
    ids, columns, batch = case["ids"][:, 0].copy(), [], range(case["sizes"]["B"])
    cache = case["cache"]
    while batch and len(columns) < count and not (columns and (ids == END).all()):
        at = past + len(columns)
        step = {**case, "sizes": {**case["sizes"], "past": at}, "ids": ids[:, None], "cache": cache}
        step |= {"positions": case["positions"][:, at : at + 1], "valid": case["valid"][:, at : at + 1]}
        found = decode_step.reference(step)
        cache = found["cache"].astype(np.float32)
        left = count - len(columns) - 1
        for b in batch:
            if ids[b] == END:
                continue
            allowed = case["missing"][states[b]] <= min(left, 254)
            u = case["uniforms"][b, len(columns)]
            ids[b] = _choose(found["logits"][b, : allowed.size], allowed, case["sampling"], u)
            states[b] = case["following"][states[b], ids[b]]
        columns.append(ids.copy())
    chosen = np.stack(columns, 1) if columns else np.zeros((len(batch), 0), np.int64)
    return {"chosen": chosen, "states": states}


def _choose(logits: np.ndarray, allowed: np.ndarray, sampling: tuple, uniform: float) -> int:
    temperature, top_k, top_p = sampling
    order = np.argsort(np.where(allowed, -logits, np.inf), kind="stable")[: allowed.sum()]
    if temperature == 0:
        return int(order[0])
    weights = np.exp((logits[order] - logits[order[0]]) / temperature)
    kept = np.count_nonzero(np.cumsum(weights) - weights < top_p * weights.sum())
    kept = min(kept, top_k or kept)
    chosen = np.sort(order[:kept])
    edges = np.cumsum(weights[np.argsort(order[:kept])])
    place = np.searchsorted(edges / edges[-1], uniform)
    assert np.abs(edges / edges[-1] - uniform).min() > EDGE / 100, "rounding decides; take another seed"
    return int(chosen[place])
