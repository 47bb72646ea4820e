#!/usr/bin/env python
"""One AdamW step over the parameters of the E64 model of ``train_step.py`` with an untied text head, 62 million.

    python benchmarks/optimizer.py --json out.json

Floor: 28 bytes a parameter (gradient, parameter and two moments read; parameter and moments written) at the
machine's copy rate.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402

from benchmarks import common, floor, peers, worker  # noqa: E402
from benchmarks.common import SHAPES, Contender, Shape  # noqa: E402

RATE, DECAY, BETAS, EPSILON = 1e-3, 0.1, (0.9, 0.95), 1e-8
BYTES = 28
COMPARED = 3  # tensors whose values are compared after a step
ALLOWED = 1e-5
SEED = 0


def tensor_shapes(shape: Shape) -> list[tuple[int, ...]]:
    """The parameters of the model, layer by layer."""
    d, kv = shape.hidden, shape.kv_heads * shape.head_dim
    layer = [(d,), (d, d), (d, kv), (d, kv), (d, d), (d,), (d, shape.experts)]
    layer += [(shape.experts, d, 2 * shape.width), (shape.experts, shape.width, d)]
    layer += [(d, 2 * shape.shared), (shape.shared, d)]
    return [*(layer * shape.layers), (d,), (shape.vocabulary, d), (shape.vocabulary, d)]


def values() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Parameters and gradients, the same in every process."""
    rng = np.random.default_rng(SEED)
    shapes = tensor_shapes(SHAPES["E64"])
    return tuple([rng.standard_normal(size, np.float32) * scale for size in shapes] for scale in (0.02, 1e-3))


def compared(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    largest = sorted(range(len(arrays)), key=lambda i: (arrays[i].size, i))
    return {f"parameter{i}": arrays[i] for i in (largest[0], largest[len(arrays) // 2], largest[-1])[:COMPARED]}


def reference() -> dict[str, np.ndarray]:
    """Some parameters after one step, in float64."""
    found = {}
    parameters, gradients = values()
    gradients = dict(zip(compared(parameters), compared(gradients).values(), strict=True))
    for name, parameter in compared(parameters).items():
        gradient = gradients[name].astype(np.float64)
        first, second = (1 - BETAS[0]) * gradient, (1 - BETAS[1]) * gradient**2
        step = first / (1 - BETAS[0]) / (np.sqrt(second / (1 - BETAS[1])) + EPSILON)
        found[name] = parameter * (1 - RATE * DECAY) - RATE * step
    return found


class Ours(worker.Contender):
    """``FusedAdamW`` of the trainer, or with ``paddle_own`` the optimizer of Paddle."""

    def __init__(self, paddle_own: bool = False) -> None:
        from ernie5 import environment

        environment.use_cores()
        import paddle

        from ernie5.trainer.fused_adamw import FusedAdamW

        parameters, gradients = values()
        self.parameters = [paddle.create_parameter(p.shape, "float32") for p in parameters]
        for parameter, start, gradient in zip(self.parameters, parameters, gradients, strict=True):
            parameter.set_value(start)
            parameter.grad = paddle.to_tensor(gradient)
        cls = paddle.optimizer.AdamW if paddle_own else FusedAdamW
        self.optimizer = cls(RATE, *BETAS, EPSILON, self.parameters, DECAY)

    def step(self) -> None:
        self.optimizer.step()

    def outputs(self) -> dict[str, np.ndarray]:
        return compared([parameter.numpy() for parameter in self.parameters])


class Torch(worker.Contender):
    """torch's AdamW, in its fused or its multi-tensor form."""

    def __init__(self, form: str) -> None:
        import torch

        parameters, gradients = values()
        self.parameters = [torch.from_numpy(p).requires_grad_() for p in parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        options = {"lr": RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": DECAY, form: True}
        self.optimizer = torch.optim.AdamW(self.parameters, **options)

    def step(self) -> None:
        self.optimizer.step()

    def outputs(self) -> dict[str, np.ndarray]:
        return compared([parameter.detach().numpy() for parameter in self.parameters])


def contenders(options: Any) -> list[Contender]:
    found = [
        Contender("ours", peers.OURS, Ours),
        Contender("torch AdamW, fused", peers.TORCH, Torch, {"form": "fused"}),
        Contender("Paddle AdamW", peers.PADDLENLP, Ours, {"paddle_own": True}),
    ]
    if options.all:
        found.append(Contender("torch AdamW, foreach", peers.TORCH, Torch, {"form": "foreach"}))
    return common.chosen(found, options)


def main() -> int:
    parser = common.argument_parser(__doc__, rounds=21)
    options = parser.parse_args()
    report = common.Report("AdamW", options)
    rates = floor.measure(options)
    report.table("Machine", ["rate", "value"], floor.rows(rates))
    count = sum(int(np.prod(size)) for size in tensor_shapes(SHAPES["E64"]))
    least = BYTES * count / rates["copy"]
    with common.Field(contenders(options), options) as field:
        errors = common.check(field, reference(), lambda name: ALLOWED)
        times = common.interleave(field, options.rounds)
    seconds = common.medians(times)
    rows = [(f"floor: {BYTES} bytes a parameter", least * 1e3, None, None)]
    for name in sorted(seconds, key=seconds.get):
        rows.append((name, seconds[name] * 1e3, common.spread(times[name]), f"{errors[name]:.1e}"))
    columns = ["contender", "median", "scatter", "error"]
    report.table(f"{count / 1e6:.1f} million parameters: ms", columns, rows)
    report.failures(field.failed)
    report.ratio("fraction_of_bandwidth_floor", seconds, least)
    report.speedup("speedup_vs_best_peer", seconds, seconds.keys() - {"ours"})
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
