"""One loss per modality, and the posterior weighting that makes one scalar of them.

Shapes: N labelled rows. All losses are means weighted by ``loss_weight``, in nats; bits are averaged over the d bits.
A mean runs over a whole optimiser step: the model adds up weighted losses of a micro-batch and divides by the weights
of the step (``total_weights``), which labels tell before any forward. So neither gradient accumulation nor the number
of processes changes a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ernie5.ops.cross_entropy import cross_entropy
from ernie5.sequence.vocabulary import IGNORE, MODALITIES, Kind

TERMS = ("text", "mtp", "image", "video", "audio")  # what a forward adds up, each with its own weights


def total_weights(batches: Iterable[Mapping[str, Any]], mtp: bool = True) -> dict[str, float]:
    """What each term's losses are divided by: the weights of its labelled positions, over all ``batches`` of a step.

    ``batches`` hold the fields of ``ernie5.sequence.packing.collate``. A term without a label is absent.
    """
    totals = dict.fromkeys(TERMS, 0.0)
    found = set()
    for batch in batches:
        weight = np.asarray(batch["loss_weight"], np.float64)
        kind, bits = np.asarray(batch["kind"]), np.asarray(batch["labels_bits"])[..., 0] != IGNORE
        labelled = {
            "text": np.asarray(batch["labels_text"]) != IGNORE,
            "mtp": (np.asarray(batch["labels_mtp"]) != IGNORE) & mtp,
            "image": bits & (kind == Kind.IMAGE_GEN),
            "video": bits & (kind == Kind.VIDEO_GEN),
            "audio": np.asarray(batch["labels_audio"])[..., 0] != IGNORE,
        }
        for name, places in labelled.items():
            totals[name] += float(weight[places].sum())
            found |= {name} if places.any() else set()
    return {name: max(totals[name], 1e-12) for name in TERMS if name in found}


def token_loss(logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    """Cross entropy of each row: logits [N,V], labels [N] -> [N]. The logits are lost in the backward pass."""
    return cross_entropy(logits, labels, consume=True)


def bit_loss(logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    """Mean two-way cross entropy over a row's labelled bits: logits [N,d,2], labels [N,d] (-100: unused) -> [N]."""
    used = (labels != IGNORE).astype(logits.dtype)
    sign = labels.astype(logits.dtype) * 2 - 1
    wrong = F.softplus(-sign * (logits[..., 1] - logits[..., 0])) * used
    return wrong.sum(-1) / paddle.clip(used.sum(-1), min=1.0)


class LossWeights(nn.Layer):
    """Posterior-based weighting: every modality's loss is rescaled to the same interval (report §3.2).

    An exponential mean of each observed loss gives w_m = clip(geometric mean of all / mean_m, minimum, maximum), a
    constant for the gradient. The report does not print a formula; this reading is ours. ``fixed`` factors multiply it.
    ``ema`` [4] is saved with the model, so a resumed run weighs as the uninterrupted one; 0 = never observed. The
    losses of a step are observed once, after it, so that all its micro-batches weigh alike.
    """

    def __init__(self, momentum: float = 0.98) -> None:
        super().__init__()
        self.register_buffer("ema", paddle.zeros([len(MODALITIES)], dtype="float32"))
        self.momentum = momentum
        self.mtp, self.minimum, self.maximum = 0.3, 0.5, 2.0
        self.fixed = dict.fromkeys(MODALITIES, 1.0)

    def forward(self, losses: dict[str, paddle.Tensor]) -> paddle.Tensor:
        """Modality -> scalar loss (absent: not in this batch; "mtp" joins text, with its factor) -> weighted sum."""
        weights = self.weights()
        return paddle.add_n([losses[name] * weights[name] for name in TERMS if name in losses])

    def weights(self) -> dict[str, float]:
        """The factor of every term in the sum."""
        weights = self._posterior()
        return {**weights, "mtp": self.mtp * weights["text"]}

    @paddle.no_grad()
    def observe(self, losses: Mapping[str, float]) -> None:
        """Takes the losses of a finished step into the means."""
        ema = self.ema.numpy().copy()
        for i, name in enumerate(MODALITIES):
            if name in losses:
                value = float(losses[name])
                ema[i] = value if ema[i] == 0 else self.momentum * ema[i] + (1 - self.momentum) * value
        self.ema.set_value(paddle.to_tensor(ema))

    def _posterior(self) -> dict[str, float]:
        ema = {name: float(value) for name, value in zip(MODALITIES, self.ema.numpy(), strict=True)}
        seen = [max(value, 1e-3) for value in ema.values() if value > 0]
        if not seen:
            return dict(self.fixed)
        reference = 1.0
        for value in seen:
            reference *= value ** (1 / len(seen))
        return {
            name: self.fixed[name]
            * (min(max(reference / max(value, 1e-3), self.minimum), self.maximum) if value > 0 else 1.0)
            for name, value in ema.items()
        }
