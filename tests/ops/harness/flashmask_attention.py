"""FlashMask attention: shapes and names as in custom_ops/flashmask_attention/flashmask_attention.h."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p

import numpy as np

SIZES = [c_int64] * 10 + [c_float]
SIGNATURES = {
    "ernie5_flashmask_attention_workspace_size": [c_int64] * 8,
    **{f"ernie5_flashmask_attention_forward_cpu_{t}": [c_void_p] * 4 + SIZES + [c_void_p] * 3 for t in ("f32", "bf16")},
    **{
        f"ernie5_flashmask_attention_backward_cpu_{t}": [c_void_p] * 7 + SIZES + [c_void_p] * 4 for t in ("f32", "bf16")
    },
}
TOLERANCE = 2e-5
ROUNDING = 2.0**-8  # of a bfloat16 result, relative
KINDS = [(True, 1), (True, 2), (False, 2), (False, 4)]  # causal, values a column

# B, S, M, N, G, h, mask heads, query start
SHAPES = [
    (0, 3, 3, 2, 1, 8, 1, 0),  # no batch item
    (2, 0, 5, 2, 2, 16, 1, 5),  # no query
    (1, 4, 0, 4, 2, 8, 1, 0),  # no key: every row is blind
    (1, 1, 1, 1, 1, 8, 1, 0),
    (2, 7, 7, 4, 2, 24, 2, 0),
    (1, 1, 301, 4, 2, 64, 1, 300),  # one row against a cache
    (2, 3, 131, 6, 2, 40, 2, 128),  # a few
    (1, 5, 64, 3, 3, 32, 3, 59),
    (1, 64, 64, 2, 2, 32, 1, 0),
    (1, 67, 67, 3, 1, 64, 1, 0),
    (2, 129, 129, 2, 1, 16, 1, 0),
    (1, 97, 229, 4, 4, 48, 4, 132),  # query_start > 0
    (1, 70, 30, 2, 1, 56, 1, 10),  # more rows than columns
    (1, 193, 193, 4, 2, 128, 2, 0),
    (1, 33, 1061, 2, 1, 80, 1, 1028),  # keys in two chunks
    (1, 211, 211, 8, 2, 104, 2, 0),
    (1, 90, 2053, 1, 1, 8, 1, 1963),  # four
]


def cases(rng: np.random.Generator) -> list[dict]:
    result = [_case(rng, shape, kind, half) for shape in SHAPES for kind in KINDS for half in (False, True)]
    return result + [
        _case(rng, _random_shape(rng), KINDS[i % 4], i % 3 == 0, layout) for i in range(8) for layout in LAYOUTS
    ]


def _random_shape(rng: np.random.Generator) -> tuple[int, ...]:
    groups, rows = int(rng.integers(1, 4)), int(rng.integers(1, 300))
    start = int(rng.integers(0, 100)) * int(rng.integers(0, 2))
    mask_heads = int(rng.choice([1, groups]))
    return (
        1,
        rows,
        rows + start,
        groups * int(rng.integers(1, 4)),
        groups,
        8 * int(rng.integers(1, 17)),
        mask_heads,
        start,
    )


def _case(
    rng: np.random.Generator, shape: tuple[int, ...], kind: tuple[bool, int], half: bool, layout: str = ""
) -> dict:
    batch, rows, columns, heads, groups, dim, mask_heads, start = shape
    causal, bounds = kind
    queries, keys = (batch, rows, heads, dim), (batch, columns, groups, dim)
    layout = layout or str(rng.choice(list(LAYOUTS)))
    intervals = LAYOUTS[layout](rng, (batch, mask_heads, columns), start + rows, causal, bounds)
    case = {
        "sizes": (*shape[:7], bounds, int(causal), start),
        "half": half,
        "layout": layout,
        "scale": float(rng.uniform(0.5, 2.0)) * dim**-0.5,
        "intervals": np.ascontiguousarray(intervals.astype(np.int32)),
    }
    for name, size in (("q", queries), ("k", keys), ("v", keys), ("grad_out", queries)):
        values = rng.standard_normal(size).astype(np.float32)
        case[name] = from_bf16(to_bf16(values)) if half else values
    return case


def _random(rng: np.random.Generator, shape: tuple[int, ...], rows: int, causal: bool, bounds: int) -> np.ndarray:
    """Any ends, outside the sequence too, many of them the wrong way round."""
    return rng.integers(-3, rows + 4, (*shape, bounds))


def _documents(rng: np.random.Generator, shape: tuple[int, ...], rows: int, causal: bool, bounds: int) -> np.ndarray:
    """Documents side by side that see themselves, causally or in groups; the last columns see themselves alone."""
    batch, heads, columns = shape
    result = np.zeros((*shape, bounds), np.int64)
    for b, g in np.ndindex(batch, heads):
        first = 0
        while first < columns:
            last = min(columns, first + int(rng.integers(1, 1 + max(1, columns // 2))))
            here = np.arange(first, last)
            if rng.random() < 0.2:
                until, since = here + 1, here
            else:
                until, since = np.full(last - first, last), here - here % int(rng.integers(1, 6))
            result[b, g, here] = _bounds(until, np.maximum(since, first), rows, causal, bounds)
            first = last
    return result


def _frames(rng: np.random.Generator, shape: tuple[int, ...], rows: int, causal: bool, bounds: int) -> np.ndarray:
    """Frames that see themselves and the two before, the first few columns seen by all."""
    columns, frame = np.arange(shape[2]), int(rng.integers(1, 50))
    since = columns // frame * frame
    until = np.where(columns < 5, rows, since + 3 * frame)
    return np.broadcast_to(_bounds(until, since, rows, causal, bounds), (*shape, bounds))


def _open(rng: np.random.Generator, shape: tuple[int, ...], rows: int, causal: bool, bounds: int) -> np.ndarray:
    """Nothing hidden, or the causal triangle alone."""
    columns = np.arange(shape[2])
    return np.broadcast_to(_bounds(columns * 0 + rows, columns * 0, rows, causal, bounds), (*shape, bounds))


def _blind(rng: np.random.Generator, shape: tuple[int, ...], rows: int, causal: bool, bounds: int) -> np.ndarray:
    """A stretch of rows sees no column at all."""
    first, last = sorted(int(x) for x in rng.integers(0, rows + 1, 2))
    stretch = {1: [first], 2: [first, last if causal else 0], 4: [first, last, 0, min(first, 2)]}
    return np.broadcast_to(np.array(stretch[bounds]), (*shape, bounds))


def _bounds(until: np.ndarray, since: np.ndarray, rows: int, causal: bool, bounds: int) -> np.ndarray:
    """A column that rows since <= row < until see, as ``bounds`` values."""
    end = np.full_like(until, rows)
    values = [until, end] if causal else [until, since] if bounds == 2 else [until, end, end * 0, since]
    return np.stack(values[:bounds], -1)


LAYOUTS = {"random": _random, "documents": _documents, "frames": _frames, "open": _open, "blind": _blind}


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even, as uint16."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def run(call: Callable, case: dict) -> dict[str, np.ndarray]:
    half, sizes = case["half"], (*case["sizes"], case["scale"])
    kind, pack, unpack = ("bf16", to_bf16, from_bf16) if half else ("f32", np.copy, np.copy)
    q, k, v, grad_out = (pack(case[name]) for name in ("q", "k", "v", "grad_out"))
    out, grad_q, grad_k, grad_v = (np.full_like(x, 7) for x in (q, q, k, v))
    lse = np.full((q.shape[0], q.shape[2], q.shape[1]), 7, np.float32)
    spaces = []
    for backward in (0, 1):
        floats = call("ernie5_flashmask_attention_workspace_size", *case["sizes"][:7], backward)
        spaces.append(np.full(max(1, floats), np.nan, np.float32))
    call(f"ernie5_flashmask_attention_forward_cpu_{kind}", q, k, v, case["intervals"], *sizes, out, lse, spaces[0])
    wanted = reference(case) if half else {}
    # A value of out that lies between two bfloat16 may round either way; the gradients are compared for one of them.
    saved = np.ascontiguousarray(to_bf16(wanted["out"])) if half else out
    name, given = f"ernie5_flashmask_attention_backward_cpu_{kind}", (q, k, v, case["intervals"], saved, lse, grad_out)
    call(name, *given, *sizes, grad_q, grad_k, grad_v, spaces[1])
    result = {"out": out, "grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    result = {key: unpack(value) for key, value in result.items()}
    if half:
        result = _unrounded(result, wanted)
    return result | {"lse": np.where(np.isneginf(lse), 0, lse), "blind": np.isneginf(lse)}


def _unrounded(result: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A bfloat16 value that is a rounding of the reference's stands for it."""
    near = {name: ROUNDING * (np.abs(wanted[name]) + _size(wanted[name])) for name in result}
    return {name: np.where(np.abs(x - wanted[name]) <= near[name], wanted[name], x) for name, x in result.items()}


def _size(x: np.ndarray) -> float:
    return float(np.abs(x).mean()) if x.size else 0.0


def reference(case: dict) -> dict[str, np.ndarray]:
    """Heads before rows throughout: q, grad_out [b,n,s,h]; k, v [b,n,m,h], repeated for the heads that share them."""
    q, k, v, grad_out = (case[name].astype(np.float64).swapaxes(1, 2) for name in ("q", "k", "v", "grad_out"))
    groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
    k, v = (x.repeat(repeats, axis=1) for x in (k, v))
    hidden = hidden_pairs(case).repeat(q.shape[1] // case["intervals"].shape[1], axis=1)
    scores = np.where(hidden, -np.inf, case["scale"] * (q @ k.swapaxes(2, 3)))
    top = scores.max(-1, keepdims=True, initial=-1e300)
    terms = np.exp(scores - top)
    total = terms.sum(-1, keepdims=True)
    blind = total[..., 0] == 0
    weights = terms / np.where(total == 0, 1, total)
    out = weights @ v
    saved = from_bf16(to_bf16(out)) if case["half"] else out  # what the backward pass is given
    delta = (saved * grad_out).sum(-1, keepdims=True)
    grad_scores = case["scale"] * weights * (grad_out @ v.swapaxes(2, 3) - delta)

    def of_keys(x: np.ndarray) -> np.ndarray:
        batch, _, length, dim = x.shape
        return x.reshape(batch, groups, repeats, length, dim).sum(2).swapaxes(1, 2)

    return {
        "out": out.swapaxes(1, 2),
        "lse": np.where(blind, 0, np.log(np.where(total == 0, 1, total))[..., 0] + top[..., 0]),
        "blind": blind,
        "grad_q": (grad_scores @ k).swapaxes(1, 2),
        "grad_k": of_keys(grad_scores.swapaxes(2, 3) @ q),
        "grad_v": of_keys(weights.swapaxes(2, 3) @ grad_out),
    }


def hidden_pairs(case: dict) -> np.ndarray:
    """bool [B, mask heads, S, M]"""
    *_, causal, start = case["sizes"]
    intervals = case["intervals"]
    rows = (start + np.arange(case["q"].shape[1]))[:, None]
    columns = np.arange(intervals.shape[2])
    ends = [intervals[:, :, None, :, i] for i in range(intervals.shape[3])]
    if causal:
        below = (rows >= ends[0]) & (rows < ends[1]) if len(ends) == 2 else rows >= ends[0]
        return below | (rows < columns)
    if len(ends) == 2:
        return (rows >= ends[0]) | (rows < ends[1])
    return ((rows >= ends[0]) & (rows < ends[1])) | ((rows >= ends[2]) & (rows < ends[3]))
