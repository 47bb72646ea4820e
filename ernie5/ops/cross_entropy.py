"""``cross_entropy``: one loss a row, without a probability matrix beside the logits.

Shapes: N rows, V classes.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from ernie5.ops import kernels


def cross_entropy(logits: paddle.Tensor, labels: paddle.Tensor, consume: bool = False) -> paddle.Tensor:
    """-log softmax(logits)[label] of each row: logits [N,V], labels int64 [N] (-100: loss 0) -> [N], in nats.

    With ``consume`` the backward pass may write the gradient over the logits, which saves as much memory again: they
    must not be used after it, and it can run only once.
    """
    if kernels.serves("cross_entropy", logits):
        return kernels.call("cross_entropy", [logits, labels], [consume])[0]
    return F.cross_entropy(logits, labels, reduction="none").reshape([-1])
