"""The backward of grouped experts in two steps: three parts, one of them empty, then the weights over all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from ctypes import c_int64, c_void_p

import numpy as np

from tests.ops.harness import moe_ffn

WEIGHTS = [c_void_p] * 6 + [c_int64] * 5 + [c_void_p] * 2
SIGNATURES = {
    **{f"ernie5_moe_ffn_forward_cpu_{kind}": moe_ffn.FORWARD for kind in moe_ffn.KINDS},
    **{f"ernie5_moe_ffn_backward_cpu_{kind}": moe_ffn.BACKWARD for kind in moe_ffn.KINDS},
    **{f"ernie5_moe_ffn_backward_weights_cpu_{kind}": WEIGHTS for kind in moe_ffn.KINDS},
}
TOLERANCE = moe_ffn.TOLERANCE
GRADIENTS = ("grad_x", "grad_weights", "grad_gate_up", "grad_down")

cases = moe_ffn.cases


def run(call: Callable[..., object], case: dict) -> dict[str, np.ndarray]:
    given, blank = moe_ffn.typed(case)
    kind, (x, gate_up, down, grad_y) = case["kind"], given.values()
    (tokens, dim), (experts, width), top_k = x.shape, down.shape[:2], case["weights"].shape[1]
    chosen = np.full(tokens * top_k, -1)
    for e, (first, last) in enumerate(itertools.pairwise(case["offsets"])):
        chosen[case["order"][first:last]] = e
    parts, grads = [], {"grad_x": [], "grad_weights": []}
    for first, last in itertools.pairwise((0, tokens // 3, tokens // 3, tokens)):
        order, offsets = moe_ffn.grouped(chosen[first * top_k : last * top_k], experts)
        xs, ys, weights = (np.ascontiguousarray(a[first:last]) for a in (x, grad_y, case["weights"]))
        sizes, rows = (last - first, top_k, dim, experts, width), len(order)
        y, hidden = blank(*xs.shape), blank(rows, 2 * width)
        scratch, work = blank(rows, dim), blank(rows, 3 * width + 64)
        inputs = (xs, weights, order, offsets, gate_up, down)
        call(f"ernie5_moe_ffn_forward_cpu_{kind}", *inputs, *sizes, y, hidden, scratch)
        grad_x, grad_weights = blank(*xs.shape), np.full(weights.shape, 7.0, np.float32)
        outputs = (grad_x, grad_weights, None, None, scratch, work)
        call(f"ernie5_moe_ffn_backward_cpu_{kind}", *inputs, hidden, ys, *sizes, *outputs)
        grads["grad_x"].append(grad_x)
        grads["grad_weights"].append(grad_weights)
        parts.append((xs, ys, work, order, offsets))
    lists = [np.array([array.ctypes.data for array in kept], np.uint64) for kept in zip(*parts, strict=True)]
    counts = np.array([len(part[0]) for part in parts], np.int64)
    sums = {"grad_gate_up": blank(*gate_up.shape), "grad_down": blank(*down.shape)}
    sizes = (len(parts), top_k, dim, experts, width)
    call(f"ernie5_moe_ffn_backward_weights_cpu_{kind}", *lists, counts, *sizes, *sums.values())
    result = {name: np.concatenate(pieces) for name, pieces in grads.items()} | sums
    return moe_ffn.compared(kind, result, reference(case))


def reference(case: dict) -> dict[str, np.ndarray]:
    whole = moe_ffn.reference(case)
    return {name: whole[name] for name in GRADIENTS}
