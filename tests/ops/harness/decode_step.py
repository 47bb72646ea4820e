"""Decoding step: shapes and names as in custom_ops/decode_step/decode_step.h."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64, c_void_p
from itertools import pairwise

import numpy as np

SIGNATURES = {
    "ernie5_decode_step_forward_cpu": [*[c_void_p] * 6, c_int64, c_void_p, *[c_int64] * 6, *[c_void_p] * 2],
}
TOLERANCE = 2e-5
NAMES = ("B", "n", "past", "D", "N", "G", "h", "E", "K", "F", "H", "V", "L")

# sizes as NAMES; then what is special: text (ids and logits), half (bfloat16 weights), softmax, split (layers one call
# each), ties (equal scores), wide (inputs for later columns too)
SHAPES = [
    ((1, 1, 0, 8, 2, 1, 4, 3, 1, 4, 0, 5, 1), ""),
    ((1, 1, 5, 32, 4, 2, 8, 6, 2, 16, 16, 40, 3), "text"),
    ((2, 1, 7, 24, 4, 2, 6, 5, 2, 12, 8, 11, 2), "text half"),
    ((0, 1, 3, 16, 2, 1, 8, 4, 2, 8, 8, 7, 2), "text"),
    ((3, 5, 37, 40, 6, 3, 16, 9, 3, 20, 24, 13, 2), "softmax split"),
    ((2, 3, 0, 17, 3, 3, 2, 7, 7, 5, 3, 3, 2), "ties"),
    ((1, 16, 61, 128, 8, 2, 64, 16, 4, 48, 32, 67, 2), "text wide"),
    ((4, 1, 130, 96, 8, 1, 32, 8, 2, 64, 0, 129, 2), "text wide half"),
    ((5, 1, 19, 64, 2, 2, 80, 31, 5, 33, 31, 64, 1), "text softmax"),
    ((4, 16, 20, 64, 4, 2, 16, 8, 2, 32, 32, 16, 2), ""),
    ((8, 16, 11, 64, 4, 2, 16, 4, 2, 24, 17, 16, 1), "half split"),
    ((3, 1, 20, 96, 4, 2, 32, 3, 2, 48, 32, 97, 2), "text half"),
    ((8, 1, 33, 64, 4, 1, 32, 2, 1, 32, 64, 64, 2), "text half"),
    ((16, 1, 9, 32, 2, 2, 32, 4, 4, 64, 32, 160, 1), "text half"),
]


def cases(rng: np.random.Generator) -> list[dict]:
    return [_case(rng, dict(zip(NAMES, sizes, strict=True)), special.split()) for sizes, special in SHAPES]


def _case(rng: np.random.Generator, s: dict[str, int], special: list[str]) -> dict:
    def matrix(*shape: int) -> np.ndarray:
        values = (rng.standard_normal(shape) * max(shape[-2], 1) ** -0.5).astype(np.float32)
        return from_bf16(to_bf16(values)) if "half" in special else values

    def norm() -> np.ndarray:
        return rng.uniform(0.5, 1.5, s["D"]).astype(np.float32)

    width, narrow = s["h"] * s["N"], s["h"] * s["G"]
    layers = [
        {
            "attention_norm": norm(),
            "query": matrix(s["D"], width),
            "key": matrix(s["D"], narrow),
            "value": matrix(s["D"], narrow),
            "out": matrix(width, s["D"]),
            "moe_norm": norm(),
            "router": (rng.standard_normal((s["D"], s["E"])) * s["D"] ** -0.5).astype(np.float32),
            "bias": (rng.standard_normal(s["E"]) * 0.1).astype(np.float32),
            "gate_up": matrix(s["E"], s["D"], 2 * s["F"]),
            "down": matrix(s["E"], s["F"], s["D"]),
            "shared_gate_up": matrix(s["D"], 2 * s["H"]),
            "shared_down": matrix(s["H"], s["D"]),
        }
        for _ in range(s["L"])
    ]
    if "ties" in special:
        for layer in layers:
            layer["router"][:], layer["bias"][:] = 0, 0
    columns, tokens = s["past"] + s["n"] + (9 if "wide" in special else 0), (s["B"], s["n"])
    cache = (s["L"], 2, s["B"], s["past"] + s["n"] + 3, s["G"], s["h"])
    return {
        "sizes": s,
        "special": special,
        "layers": layers,
        "embedding": matrix(s["V"], s["D"]),
        "final_norm": norm(),
        "frequencies": rng.uniform(0, 1, (3, s["h"] // 2)).astype(np.float32),
        "cache": rng.standard_normal(cache).astype(np.float32),
        "hidden": rng.standard_normal((*tokens, s["D"])).astype(np.float32),
        "ids": rng.integers(0, s["V"], tokens),
        "positions": rng.uniform(0, 50, (*tokens, 3)).astype(np.float32),
        "intervals": _intervals(rng, s["B"], columns),
        "valid": (rng.random(tokens) < 0.8).astype(np.uint8),
    }


def _intervals(rng: np.random.Generator, batch: int, columns: int) -> np.ndarray:
    """Causal, with stretches hidden from all and holes; the first row sees nothing but itself."""
    intervals = np.zeros((batch, columns, 4), np.int32)
    own = np.arange(columns)
    intervals[..., 0] = np.where(rng.random((batch, columns)) < 0.2, own + 1, columns + 5)
    intervals[..., 1] = columns + 5
    intervals[..., 3] = own
    return intervals


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even, as uint16."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


MATRICES = {"query", "key", "value", "out", "gate_up", "down", "shared_gate_up", "shared_down"}
EPS, SCALE = 1e-6, 1.7


def _plan(case: dict) -> tuple[np.ndarray, list[np.ndarray]]:
    """The model as the kernel wants it, and what its addresses point to."""
    s, half = case["sizes"], "half" in case["special"]

    def stored(value: np.ndarray, name: str) -> np.ndarray:
        return to_bf16(value) if half and name in MATRICES | {"embedding"} else np.ascontiguousarray(value)

    kept = [case["frequencies"], case["final_norm"], stored(case["embedding"], "embedding")]
    bits = [int(np.float64(value).view(np.int64)) for value in (EPS, SCALE)]
    header = [half, s["L"], s["D"], s["N"], s["G"], s["h"], s["E"], s["K"], s["F"], s["H"], s["V"]]
    header += ["softmax" in case["special"], *bits, *(array.ctypes.data for array in kept)]
    for layer in case["layers"]:
        for name, value in layer.items():
            kept.append(stored(value, name))
            header.append(kept[-1].ctypes.data)
    return np.array(header, np.int64), kept


def run(call: Callable, case: dict) -> dict[str, np.ndarray]:
    s, text = case["sizes"], "text" in case["special"]
    model, kept = _plan(case)
    cache = case["cache"].copy()
    addresses = [part.ctypes.data for layer in cache for part in layer]
    table = np.array([s["B"], cache.shape[3], *addresses], np.int64)
    hidden, logits = case["hidden"].copy(), np.full((s["B"], s["V"]), 7, np.float32)
    cuts = range(s["L"] + 1) if "split" in case["special"] else (0, s["L"])
    stride = s["n"] + (3 if "wide" in case["special"] else 0)

    def window(array: np.ndarray) -> np.ndarray:
        """The array with rows behind those of each sequence, which are not read."""
        behind = np.full((s["B"], stride - s["n"], *array.shape[2:]), 99, array.dtype)
        return np.concatenate([array, behind], axis=1)

    columns = (case["intervals"], case["intervals"].shape[1])
    rest = (window(case["positions"]), *columns, window(case["valid"]), s["B"], s["n"], stride, s["past"])
    ids = window(case["ids"]) if text else None
    for first, last in pairwise(cuts):
        out = np.full_like(hidden, 7)
        given = None if text else hidden
        end = logits if text else None
        failed = call("ernie5_decode_step_forward_cpu", model, table, given, ids, *rest, first, last, out, end)
        assert not failed and kept
        hidden = out
    if not text:
        return {"hidden": hidden, "cache": cache}
    return {"hidden": hidden[:, -1], "cache": cache, "logits": logits}


def reference(case: dict) -> dict[str, np.ndarray]:
    s, text = case["sizes"], "text" in case["special"]
    cache = case["cache"].astype(np.float64)
    embedding = case["embedding"].astype(np.float64)
    x = embedding[case["ids"]] if text else case["hidden"].astype(np.float64)
    angles = (case["positions"] @ case["frequencies"]).astype(np.float64)[:, :, None]
    seen = s["past"] + s["n"]
    rows = np.arange(s["past"], seen)[None, :, None]
    lts, lte, uts, ute = np.moveaxis(case["intervals"][:, None, :seen].astype(np.int64), -1, 0)
    hidden = ((rows >= lts) & (rows < lte)) | ((rows >= uts) & (rows < ute))
    for weights, kept in zip(case["layers"], cache, strict=True):
        w = {name: value.astype(np.float64) for name, value in weights.items()}
        x = x + _attention(_norm(x, w["attention_norm"]), w, kept, angles, hidden, s)
        normed = _norm(x, w["moe_norm"])
        shared = _swiglu(normed @ w["shared_gate_up"]) @ w["shared_down"]
        x = x + _routed(normed, w, case) + shared
    result = {"hidden": x, "cache": cache}
    if text:
        result["hidden"] = x[:, -1]  # the other rows stay out of the last layer
        result["logits"] = _norm(x[:, -1], case["final_norm"].astype(np.float64)) @ embedding.T
    return result


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def _swiglu(x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x, 2, -1)
    return gate / (1 + np.exp(-gate)) * up


def _turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = even * np.cos(angles) - odd * np.sin(angles), odd * np.cos(angles) + even * np.sin(angles)
    return np.stack(pairs, -1).reshape(x.shape)


def _attention(
    x: np.ndarray, w: dict, kept: np.ndarray, angles: np.ndarray, hidden: np.ndarray, s: dict[str, int]
) -> np.ndarray:
    heads = (("query", s["N"]), ("key", s["G"]), ("value", s["G"]))
    q, k, v = ((x @ w[name]).reshape(*x.shape[:2], count, s["h"]) for name, count in heads)
    here = slice(s["past"], s["past"] + s["n"])
    kept[0][:, here], kept[1][:, here] = _turned(k, angles), v
    k, v = (part[:, : here.stop].repeat(s["N"] // s["G"], 2) for part in kept)
    scores = np.einsum("bsnh,bmnh->bnsm", _turned(q, angles), k) * s["h"] ** -0.5
    scores = np.where(hidden[:, None], -np.inf, scores)
    highest = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), -1e300)
    weights = np.exp(scores - highest)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bnsm,bmnh->bsnh", weights, v).reshape(*x.shape[:2], s["N"] * s["h"]) @ w["out"]


def _routed(x: np.ndarray, w: dict, case: dict) -> np.ndarray:
    logits = x @ w["router"]
    scores = 1 / (1 + np.exp(-logits))
    if "softmax" in case["special"]:
        scores = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
        scores = scores / scores.sum(-1, keepdims=True)
    experts = np.argsort(-(scores + w["bias"]), -1, kind="stable")[..., : case["sizes"]["K"]]
    chosen = np.take_along_axis(scores, experts, -1)
    chosen = chosen * (SCALE / chosen.sum(-1, keepdims=True)) * case["valid"][..., None]
    out = np.zeros_like(x)
    for place in np.ndindex(*experts.shape):
        at, e = place[:-1], experts[place]
        out[at] += chosen[place] * (_swiglu(x[at] @ w["gate_up"][e]) @ w["down"][e])
    return out
