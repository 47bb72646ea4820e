"""One rank of tests/parallel/test_dispatch.py: runs every case through every dispatcher, and writes what came out.

python dispatch_worker.py FOLDER DTYPE; `tokens_of`, `case_inputs` and `CASES` are the test's as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import ernie5  # noqa: F401  before paddle: it settles what Paddle reads when imported

EXPERTS, HIDDEN, WIDTH, TOP_K = 12, 16, 24, 3
OVERLAPPED = {"overlapped, 1 chunk": 1, "overlapped, 3 chunks": 3, "overlapped, 8 chunks": 8}
DISPATCHERS = ("all_to_all", *OVERLAPPED)


def _random(rng: np.random.Generator, tokens: int, top_k: int = TOP_K) -> np.ndarray:
    return np.stack([rng.permutation(EXPERTS)[:top_k] for _ in range(tokens)]).reshape([tokens, top_k])


def _even(rng: np.random.Generator, rank: int, ranks: int) -> np.ndarray:
    return _random(rng, 13)


def _uneven(rng: np.random.Generator, rank: int, ranks: int) -> np.ndarray:
    return _random(rng, 2 + 7 * rank)


def _a_rank_without_tokens(rng: np.random.Generator, rank: int, ranks: int) -> np.ndarray:
    return _random(rng, 0 if rank == 0 else 9) if rank else np.zeros([0, TOP_K], np.int64)


def _a_rank_that_receives_none(rng: np.random.Generator, rank: int, ranks: int) -> np.ndarray:
    local = EXPERTS // ranks
    return np.stack([rng.permutation(EXPERTS - local)[:TOP_K] for _ in range(11)])


def _all_on_one_expert(rng: np.random.Generator, rank: int, ranks: int) -> np.ndarray:
    return np.full([10, 1], 3)


def _padding(rng: np.random.Generator, rank: int, ranks: int) -> np.ndarray:
    experts = _random(rng, 12)
    experts[rng.random(12) < 0.5] = -1
    if rank == 1:
        experts[:] = -1
    return experts


def _nothing_routed(rng: np.random.Generator, rank: int, ranks: int) -> np.ndarray:
    return np.full([4, TOP_K], -1)


def _no_tokens(rng: np.random.Generator, rank: int, ranks: int) -> np.ndarray:
    return np.zeros([0, TOP_K], np.int64)


CASES: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "even": _even,
    "uneven": _uneven,
    "a rank without tokens": _a_rank_without_tokens,
    "a rank that receives none": _a_rank_that_receives_none,
    "all on one expert": _all_on_one_expert,
    "padding": _padding,
    "nothing routed": _nothing_routed,
    "no tokens": _no_tokens,
}


def case_inputs(case: str, rank: int, ranks: int) -> dict[str, np.ndarray]:
    """x, dy [T,D], experts [T,K] and weights [T,K] (0 where not routed) of one rank."""
    rng = np.random.default_rng([list(CASES).index(case), rank])
    experts = CASES[case](rng, rank, ranks)
    tokens, top_k = experts.shape
    weights = rng.random([tokens, top_k]) * (experts >= 0)
    return {
        "x": rng.standard_normal([tokens, HIDDEN]),
        "dy": rng.standard_normal([tokens, HIDDEN]),
        "experts": experts.astype(np.int32),
        "weights": weights,
    }


def layer_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "gate_up": rng.standard_normal([EXPERTS, HIDDEN, 2 * WIDTH]) * 0.3,
        "down": rng.standard_normal([EXPERTS, WIDTH, HIDDEN]) * 0.3,
        "shared_gate_up": rng.standard_normal([HIDDEN, 2 * WIDTH]) * 0.3,
        "shared_down": rng.standard_normal([WIDTH, HIDDEN]) * 0.3,
    }


def run_case(dispatcher, inputs: dict[str, np.ndarray], local: slice, dtype: str) -> dict[str, np.ndarray]:
    """Forward and backward; y and every gradient as float64."""
    import paddle

    from ernie5.ops.experts import dense_ffn
    from ernie5.ops.route import Routing, permutation

    def leaf(values: np.ndarray, kind: str = dtype) -> paddle.Tensor:
        tensor = paddle.to_tensor(values.astype(np.float64)).astype(kind)
        tensor.stop_gradient = False
        return tensor

    w = layer_weights()
    x, weights = leaf(inputs["x"]), leaf(inputs["weights"], "float64" if dtype == "float64" else "float32")
    experts = paddle.to_tensor(inputs["experts"])
    gate_up, down = leaf(w["gate_up"][local]), leaf(w["down"][local])
    shared = leaf(w["shared_gate_up"]), leaf(w["shared_down"])
    routing = Routing(experts, weights, *permutation(experts, EXPERTS))
    y = dispatcher(x, routing, gate_up, down, lambda tokens: dense_ffn(tokens, *shared))
    y.backward(paddle.to_tensor(inputs["dy"]).astype(dtype))
    found = {"y": y, "dx": x.grad, "dweights": weights.grad, "dgate_up": gate_up.grad, "ddown": down.grad}
    found |= {"dshared_gate_up": shared[0].grad, "dshared_down": shared[1].grad}
    return {name: tensor.astype("float64").numpy() for name, tensor in found.items()}


def main() -> None:
    import paddle
    import paddle.distributed as dist

    from ernie5.parallel import leaving
    from ernie5.parallel.dispatch import make_dispatcher

    folder, dtype = Path(sys.argv[1]), sys.argv[2]
    paddle.set_device("cpu")
    leaving.prepare()
    dist.init_parallel_env()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.collective._get_default_group()
    local = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    found = {}
    dispatchers = {"all_to_all": make_dispatcher("all_to_all", group)}
    dispatchers |= {name: make_dispatcher("all_to_all_overlapped", group, n) for name, n in OVERLAPPED.items()}
    for case in CASES:
        for name, dispatcher in dispatchers.items():
            for turn in range(2):  # a second turn must say the same, bit for bit
                out = run_case(dispatcher, case_inputs(case, rank, ranks), local, dtype)
                found |= {f"{case}/{name}/{turn}/{key}": value for key, value in out.items()}
    np.savez(folder / f"rank{rank}.npz", **found)


if __name__ == "__main__":
    main()
