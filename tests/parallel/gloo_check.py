"""Run as three processes by ``test_gloo``: each filled gap against its meaning."""

from __future__ import annotations

import ernie5  # noqa: F401  (before paddle)

# isort: split
import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.distributed.fleet.layers.mpu import mp_ops

from ernie5.parallel import gloo

ROWS, CLASSES = 5, 4


def check_split_loss(rank: int, ranks: int) -> None:
    rng = np.random.default_rng(0)
    whole = paddle.to_tensor(rng.standard_normal((ROWS, CLASSES * ranks)) * 5, stop_gradient=False)
    labels = paddle.to_tensor([0, 11, 5, -100, 6])
    expected = F.cross_entropy(whole, labels, reduction="none")
    weights = paddle.to_tensor(rng.standard_normal((ROWS, 1)))
    (expected.reshape([-1, 1]) * weights).sum().backward()
    here = slice(rank * CLASSES, (rank + 1) * CLASSES)
    part = whole.detach()[:, here]
    part.stop_gradient = False
    found = mp_ops._c_softmax_with_cross_entropy(part, labels)
    (found * weights).sum().backward()
    np.testing.assert_allclose(found.numpy().ravel(), expected.numpy().ravel(), atol=1e-12)
    np.testing.assert_allclose(part.grad.numpy(), whole.grad.numpy()[:, here], atol=1e-12)


def check_reduce_scatter(rank: int, ranks: int) -> None:
    own = paddle.empty([2], "float64")
    dist.stream.reduce_scatter(own, paddle.arange(2 * ranks).astype("float64") * (rank + 1))
    expected = np.arange(2 * ranks)[2 * rank : 2 * rank + 2] * (ranks * (ranks + 1) / 2)
    np.testing.assert_allclose(own.numpy(), expected)


def check_lookup(rank: int) -> None:
    table = paddle.ones([4, 2], "float64")
    table.stop_gradient = False
    rows = mp_ops._c_lookup_table(table, paddle.to_tensor([4 * rank + 1, 4 * rank + 1, 99]), 4 * rank)
    rows.sum().backward()
    assert rows.numpy().tolist() == [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert table.grad.numpy().tolist() == [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]


def check_neighbours(rank: int, ranks: int) -> None:
    """Everybody sends both ways before anybody receives, more than a socket buffers."""
    neighbours = gloo.Neighbours([list(range(ranks))], rank)
    large = paddle.full([300, 300], float(rank), "float64")
    for _ in range(3):
        forward, backward = neighbours.send_forward_backward_recv_forward_backward(
            (large, large[:1, :2]), large[:2], True, True
        )
        assert [list(t.shape) for t in (*forward, *backward)] == [[300, 300], [1, 2], [2, 300]]
        assert float(forward[0].mean()) == (rank - 1) % ranks
        assert float(backward[0].mean()) == (rank + 1) % ranks


def main() -> None:
    gloo.install()
    dist.init_parallel_env()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([first, second]) for first, second in ((0, 1), (1, 2), (0, 2))]
    for group in pairs:
        if rank in group.ranks:
            total = paddle.to_tensor([1.0])
            dist.all_reduce(total, group=group)
            assert float(total) == 2.0
    check_split_loss(rank, ranks)
    check_reduce_scatter(rank, ranks)
    check_lookup(rank)
    check_neighbours(rank, ranks)
    dist.barrier()
    print("right")


if __name__ == "__main__":
    main()
