#!/usr/bin/env python
"""One mixture-of-experts layer, 2,048 tokens, forward and all gradients: router, routed experts, shared expert.

    python benchmarks/moe_layer.py --json out.json

Floor: the layer's matrix products at the machine's best fp32 rate, plus its weights read twice and their gradients
written once at the machine's copy rate.
"""

from __future__ import annotations

import operator
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402

from benchmarks import common, floor, peers, worker  # noqa: E402
from benchmarks.common import SHAPES, Contender, Shape  # noqa: E402
from benchmarks.peer_models import (  # noqa: E402
    huggingface_config,
    layer_weights,
    load_huggingface_layer,
    ours_config,
    paddlenlp_config,
)

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
ALLOWED = {"fp32": 1e-4, "bf16": 3e-2}
ALLOWED_PEER_BF16 = 0.3  # routing in bfloat16 sends some tokens elsewhere
SEED = 0
NAMES = {  # of the weights, in a layer of ours
    "router": "router.weight",
    "gate_up": "experts.gate_up",
    "down": "experts.down",
    "shared_gate_up": "shared.gate_up",
    "shared_down": "shared.down",
}
FIGURES = (
    "fp32_speedup_vs_best_peer",
    "bf16_speedup_vs_best_peer",
    "fp32_fraction_of_floor",
    "speedup_vs_paddlenlp",
)


def inputs(shape: Shape) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """x and dy [B,S,D] and the layer's weights, the same in every process, exact in bfloat16."""
    rng = np.random.default_rng(SEED)
    x, dy = (common.as_bfloat16(rng.standard_normal((shape.batch, shape.length, shape.hidden))) for _ in range(2))
    return x, dy, layer_weights(shape, rng)


# ---------------------------------------------------------------------- reference


def reference(shape: Shape) -> dict[str, np.ndarray]:
    """Output and gradients of the layer in float64."""
    return reference_of(shape, *inputs(shape))


def reference_of(shape: Shape, x: np.ndarray, dy: np.ndarray, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same of given inputs, expert by expert."""
    x, dy = (a.reshape(-1, shape.hidden).astype(np.float64) for a in (x, dy))
    w = {name: values.astype(np.float64) for name, values in weights.items()}
    logits = x @ w["router"]
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    experts = np.argsort(-scores, axis=-1, kind="stable")[:, : shape.top_k]
    picked = np.take_along_axis(scores, experts, -1)
    combine = picked / picked.sum(-1, keepdims=True)
    y, grads = feed_forward(x, dy, w["shared_gate_up"], w["shared_down"])
    out = {"y": y, "dx": grads[0], "dshared_gate_up": grads[1], "dshared_down": grads[2]}
    dcombine = add_experts(out, x, dy, experts, combine, w)
    dpicked = (dcombine - (dcombine * combine).sum(-1, keepdims=True)) / picked.sum(-1, keepdims=True)
    dscores = np.zeros_like(scores)
    np.put_along_axis(dscores, experts, dpicked, -1)
    dlogits = scores * (dscores - (dscores * scores).sum(-1, keepdims=True))
    out["dx"] += dlogits @ w["router"].T
    return out | {"drouter": x.T @ dlogits}


def add_experts(
    out: dict[str, np.ndarray],
    x: np.ndarray,
    dy: np.ndarray,
    experts: np.ndarray,
    combine: np.ndarray,
    w: dict[str, np.ndarray],
) -> np.ndarray:
    """Adds the routed ``experts`` [T,K], weighed by ``combine`` [T,K], and gradients to ``out``; dcombine [T,K]."""
    out |= {"dgate_up": np.zeros_like(w["gate_up"]), "ddown": np.zeros_like(w["down"])}
    dcombine = np.zeros_like(combine)
    for e in range(len(w["down"])):
        rows, k = np.nonzero(experts == e)
        share = combine[rows, k][:, None]
        y, grads = feed_forward(x[rows], dy[rows] * share, w["gate_up"][e], w["down"][e])
        out["y"][rows] += y * share
        out["dx"][rows] += grads[0]
        out["dgate_up"][e], out["ddown"][e] = grads[1:]
        dcombine[rows, k] = (y * dy[rows]).sum(-1)
    return dcombine


def feed_forward(x: np.ndarray, dy: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> tuple[np.ndarray, tuple]:
    """SwiGLU of rows x [T,D] -> y [T,D], and the gradients of x, gate_up and down for dy."""
    gate, up = np.split(x @ gate_up, 2, axis=-1)
    sigmoid = 1 / (1 + np.exp(-gate))
    hidden = gate * sigmoid * up
    dhidden = dy @ down.T
    dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    dprojected = np.concatenate([dgate, dhidden * gate * sigmoid], axis=-1)
    return hidden @ down, (dprojected @ gate_up.T, x.T @ dprojected, hidden.T @ dy)


# ---------------------------------------------------------------------- contenders


class Ours(worker.Contender):
    """``ernie5.model.layers.MoE``; with ERNIE5_KERNELS=reference it is Paddle's padded bmm."""

    def __init__(self, shape: str, dtype: str) -> None:
        config = ours_config(SHAPES[shape])
        import paddle

        from ernie5.model.layers import MoE, to_bfloat16

        x, dy, weights = inputs(SHAPES[shape])
        layer = MoE(config)
        for name, path in NAMES.items():
            operator.attrgetter(path)(layer).set_value(weights[name])
        if dtype == "bf16":
            to_bfloat16(layer)
        self.layer = layer
        self.parameters = {name: operator.attrgetter(path)(layer) for name, path in NAMES.items()}
        self.x = paddle.to_tensor(x).astype(DTYPES[dtype])
        self.x.stop_gradient = False
        self.dy = paddle.to_tensor(dy).astype(DTYPES[dtype])
        self.valid = paddle.ones(x.shape[:2], dtype="bool")

    def step(self) -> None:
        for tensor in (self.x, *self.parameters.values()):
            tensor.clear_gradient(False)
        self.y = self.layer(self.x, self.valid)
        self.y.backward(self.dy)

    def outputs(self) -> dict[str, np.ndarray]:
        tensors = {"y": self.y, "dx": self.x.grad} | {f"d{name}": p.grad for name, p in self.parameters.items()}
        arrays = {name: tensor.astype("float32").numpy() for name, tensor in tensors.items()}
        return {name: a.reshape(-1, a.shape[-1]) if name in ("y", "dx") else a for name, a in arrays.items()}


class HuggingFace(worker.Contender):
    """A sparse block of transformers; Qwen3's gets the shared expert that it lacks, in their own MLP class."""

    def __init__(self, family: str, shape: str, dtype: str, compiled: bool = False) -> None:
        import torch
        from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as ernie
        from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

        x, dy, weights = inputs(SHAPES[shape])
        config = huggingface_config(family, SHAPES[shape])
        if family == "ernie":
            self.block = ernie.Ernie4_5_MoeSparseMoeBlock(config)
            self.shared = self.block.shared_experts
        else:
            self.block = qwen3.Qwen3MoeSparseMoeBlock(config)
            self.shared = qwen3.Qwen3MoeMLP(config, SHAPES[shape].shared)
        load_huggingface_layer(self.block, weights, self.shared)
        precision = getattr(torch, DTYPES[dtype])
        self.block.to(precision)
        self.shared.to(precision)
        self.parameters = [*self.block.parameters()] + ([] if family == "ernie" else [*self.shared.parameters()])
        self.forward = self.block if family == "ernie" else lambda x: self.block(x) + self.shared(x)
        self.forward = torch.compile(self.forward) if compiled else self.forward
        self.x = torch.from_numpy(x).to(precision).requires_grad_()
        self.dy = torch.from_numpy(dy).to(precision)

    def step(self) -> None:
        for tensor in (self.x, *self.parameters):
            tensor.grad = None
        out = self.forward(self.x)
        self.y = out[0] if isinstance(out, tuple) else out
        self.y.backward(self.dy)

    def outputs(self) -> dict[str, np.ndarray]:
        experts, shared = self.block.experts, self.shared
        found = {
            "y": self.y.detach().flatten(0, 1),
            "dx": self.x.grad.flatten(0, 1),
            "drouter": self.block.gate.weight.grad.T,
            "dgate_up": experts.gate_up_proj.grad.transpose(1, 2),
            "ddown": experts.down_proj.grad.transpose(1, 2),
            "dshared_down": shared.down_proj.weight.grad.T,
        }
        return {name: tensor.float().numpy() for name, tensor in found.items()}


class PaddleNLP(worker.Contender):
    """PaddleNLP's sparse block of Qwen2-MoE, or of Mixtral with the shared expert it lacks, in its own MLP class."""

    def __init__(self, family: str, shape: str) -> None:
        sizes = SHAPES[shape]
        config = paddlenlp_config(family, sizes)
        import paddle
        from paddlenlp.transformers.mixtral.modeling import MixtralMLP, MixtralSparseMoeBlock
        from paddlenlp.transformers.qwen2_moe.modeling import Qwen2MoeSparseMoEBlock

        x, dy, weights = inputs(sizes)
        if family == "mixtral":
            self.block = MixtralSparseMoeBlock(config)
            config.intermediate_size = sizes.shared
            self.block.shared = MixtralMLP(config)
            self.forward = lambda x: self.block(x)[0] + self.block.shared(x)
        else:
            self.block = Qwen2MoeSparseMoEBlock(config)
            self.forward = lambda x: self.block(x)[0]
        _load_paddlenlp_layer(self.block, weights)
        self.parameters = list(self.block.parameters())
        self.x = paddle.to_tensor(x, stop_gradient=False)
        self.dy = paddle.to_tensor(dy)

    def step(self) -> None:
        for tensor in (self.x, *self.parameters):
            tensor.clear_gradient(False)
        self.y = self.forward(self.x)
        self.y.backward(self.dy)

    def outputs(self) -> dict[str, np.ndarray]:
        down = ["w2" if hasattr(expert, "w2") else "down_proj" for expert in self.block.experts]
        grads = [getattr(e, name).weight.grad for e, name in zip(self.block.experts, down, strict=True)]
        return {
            "y": self.y.numpy().reshape(-1, self.y.shape[-1]),
            "ddown": np.stack([grad.numpy() for grad in grads]),
        }


def _load_paddlenlp_layer(block: Any, weights: dict[str, np.ndarray]) -> None:
    """Copies ``layer_weights``. Qwen2-MoE halves its shared expert with a gate of zeros, so that one counts twice."""
    gate, up = np.split(weights["gate_up"], 2, axis=-1)
    shared_gate, shared_up = np.split(weights["shared_gate_up"], 2, axis=-1)
    block.gate.weight.set_value(weights["router"])
    mixtral = hasattr(block, "shared")
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")

    def load(expert: Any, *values: np.ndarray) -> None:
        for name, value in zip(names, values, strict=True):
            getattr(expert, name).weight.set_value(value)

    for e, expert in enumerate(block.experts):
        load(expert, gate[e], up[e], weights["down"][e])
    if mixtral:
        load(block.shared, shared_gate, shared_up, weights["shared_down"])
        return
    block.gate.norm_topk_prob = True  # the configuration says so too, but its block forgets to pass it on
    load(block.shared_expert, shared_gate, shared_up, 2 * weights["shared_down"])
    block.shared_expert_gate.weight.set_value(np.zeros(block.shared_expert_gate.weight.shape, np.float32))


def contenders(shape: str, dtype: str, options: Any) -> list[Contender]:
    """Ours first, then every peer at the settings that were fastest; ``--all`` adds the settings that lost."""
    same = {"shape": shape, "dtype": dtype}
    found = [Contender("ours", peers.OURS, Ours, same)]
    for family, name in (("ernie", "HF Ernie-4.5-MoE"), ("qwen3", "HF Qwen3-MoE")):
        found.append(Contender(f"{name}, grouped_mm", peers.TORCH, HuggingFace, {"family": family, **same}))
        if options.all:
            compiled = {"family": family, "compiled": True, **same}
            found.append(Contender(f"{name}, grouped_mm, compiled", peers.TORCH, HuggingFace, compiled))
    if dtype == "fp32":
        reference = {"ERNIE5_KERNELS": "reference"}
        found.append(Contender("Paddle, padded bmm", peers.PADDLENLP, Ours, same, reference))
        for family, name in (("qwen2", "PaddleNLP Qwen2-MoE"), ("mixtral", "PaddleNLP Mixtral")):
            found.append(Contender(name, peers.PADDLENLP, PaddleNLP, {"family": family, "shape": shape}))
    return common.chosen(found, options)


# ---------------------------------------------------------------------- measurement


def floor_seconds(shape: Shape, rates: dict[str, float]) -> tuple[float, float]:
    """(matrix products, weight traffic) of one fp32 step at the machine's rates."""
    expert, shared = 3 * shape.hidden * shape.width, 3 * shape.hidden * shape.shared
    router = shape.hidden * shape.experts
    products = 2 * 3 * shape.tokens * (shape.top_k * expert + shared + router)
    weights = 4 * (shape.experts * expert + shared + router)
    return products / rates["sgemm"], 3 * weights / rates["copy"]


def measure(shape: Shape, dtype: str, options: Any, report: common.Report, rates: dict[str, float]) -> None:
    label = f"_{shape.name.lower()}"
    expected = reference(shape)
    with common.Field(contenders(shape.name, dtype, options), options) as field:
        own = {name for name, kind in field.kinds.items() if kind == peers.OURS}
        errors = common.check(
            field, expected, lambda name: ALLOWED_PEER_BF16 if dtype == "bf16" and name not in own else ALLOWED[dtype]
        )
        times = common.interleave(field, options.rounds, turn=options.turn)
        seconds = common.medians(times)
    products, traffic = floor_seconds(shape, rates)
    rows = []
    if dtype == "fp32":
        parts = f"floor: {products * 1e3:.0f} products + {traffic * 1e3:.0f} weights"
        rows.append((parts, (products + traffic) * 1e3, None, None))
        report.ratio(f"fp32_fraction_of_floor{label}", seconds, products + traffic)
        report.speedup(f"speedup_vs_paddlenlp{label}", seconds, [n for n in seconds if n.startswith("PaddleNLP")])
    report.speedup(f"{dtype}_speedup_vs_best_peer{label}", seconds, seconds.keys() - own)
    for name in sorted(seconds, key=seconds.get):
        rows.append((name, seconds[name] * 1e3, common.spread(times[name]), f"{errors[name]:.1e}"))
    report.table(f"{shape.name}, {dtype}: ms", ["contender", "median", "scatter", "error"], rows)
    report.failures(field.failed)


def main() -> int:
    parser = common.argument_parser(__doc__, rounds=15)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--turn", type=int, default=2, help="timed steps a turn, after one that is not timed")
    options = parser.parse_args()
    report = common.Report("One MoE layer", options)
    rates = floor.measure(options)
    report.table("Machine", ["rate", "value"], floor.rows(rates))
    for dtype in options.dtypes:
        for shape in options.shapes:
            measure(SHAPES[shape], dtype, options, report, rates)
    suffixes = [shape.lower() for shape in options.shapes]
    for name in FIGURES:
        report.worst(name, suffixes)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
