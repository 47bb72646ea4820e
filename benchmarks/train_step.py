#!/usr/bin/env python
"""A whole training step: forward, backward and AdamW of a four-layer model on text, 4 rows of 512 tokens.

    python benchmarks/train_step.py --json out.json

Everyone's step is the same work: next-token loss over 8,192 words, tied embeddings, AdamW with weight decay, no
clipping. Qwen3-MoE and Mixtral have no shared expert, so they do a little less. Floor: the step's matrix products at
the machine's best fp32 rate, and AdamW's 28 bytes a parameter at its copy rate.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402

from benchmarks import common, floor, peer_models, peers, worker  # noqa: E402
from benchmarks.common import SHAPES, Contender, Shape  # noqa: E402

ALLOWED = {"fp32": 1e-3, "bf16": 0.2}  # of gradients too; in bfloat16 some tokens go to other experts
RATE, DECAY, BETAS, EPSILON = 1e-4, 0.1, (0.9, 0.95), 1e-8
FIGURES = {"fp32_speedup_vs_best_peer": min, "bf16_speedup_vs_best_peer": min, "peak_memory_vs_best_peer": max}
SEED = 0


def token_ids(shape: Shape) -> np.ndarray:
    """int64 [B,S]: BOS, random words, EOS."""
    ids = np.random.default_rng(SEED).integers(16, shape.vocabulary, (shape.batch, shape.length))
    ids[:, 0], ids[:, -1] = 1, 2
    return ids


class Given:
    """Stands in for a text tokenizer: the ids are known."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def encode(self, text: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        return self.ids.tolist()


class Ours(worker.Contender):
    """``Ernie5ForCausalLM`` with the trainer's optimizer, on a batch that the sequence package packs."""

    def __init__(self, shape: str, dtype: str) -> None:
        self.shape, config = SHAPES[shape], peer_models.ours_config(SHAPES[shape])
        import paddle

        from ernie5.model.modeling import Ernie5ForCausalLM
        from ernie5.trainer.optimizer import decays

        self.model = Ernie5ForCausalLM(config)
        if dtype == "bf16":
            self.model.to_bfloat16()
        self.model.train()
        decayed = {p.name for name, p in self.model.named_parameters() if decays(name, p)}
        self.optimizer = _our_adamw()(
            learning_rate=RATE,
            beta1=BETAS[0],
            beta2=BETAS[1],
            epsilon=EPSILON,
            weight_decay=DECAY,
            parameters=self.model.parameters(),
            apply_decay_param_fun=decayed.__contains__,
            multi_precision=dtype == "bf16",
        )
        self.batch = {name: paddle.to_tensor(values) for name, values in self._batch(config).items()}

    def _batch(self, config: Any) -> dict[str, np.ndarray]:
        from ernie5.sequence.layout import lay_out
        from ernie5.sequence.packing import collate, pack
        from ernie5.sequence.parts import Sample, Text
        from ernie5.sequence.spec import LayoutSpec

        spec = LayoutSpec.of_model(config, (1, 2), [config.vision_bits])
        documents = [lay_out(Sample([Text("")]), Given(ids[1:-1]), spec) for ids in token_ids(self.shape)]
        return collate([pack([document], self.shape.length) for document in documents])

    def step(self) -> None:
        self.model(**self.batch)["loss"].backward()
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)

    def save(self, path: str) -> None:
        peer_models.save_ours(self.model, path)

    def gradients(self, path: str) -> None:
        """Loss and some gradients of one forward and backward, without a change of the weights."""
        out = self.model(**self.batch)
        out["loss"].backward()
        last = self.model.layers[-1]
        found = {
            "loss": out["losses"]["text"],
            "norm": self.model.norm.weight.grad,
            "query": self.model.layers[0].attention.q_proj.weight.grad,
            "gate_up": last.moe.experts.gate_up.grad,
            "router": last.moe.router.weight.grad,
        }
        np.savez(
            path, **{name: tensor.astype("float32").numpy().reshape(tensor.shape) for name, tensor in found.items()}
        )
        self.optimizer.clear_grad(set_to_zero=False)


def _our_adamw() -> type:
    from ernie5.trainer.fused_adamw import FusedAdamW

    return FusedAdamW


class HuggingFace(worker.Contender):
    """A causal language model of transformers with torch's fused AdamW."""

    def __init__(self, family: str, shape: str, mode: str, compiled: bool = False) -> None:
        import torch

        torch.manual_seed(SEED)
        self.torch, self.mode = torch, mode
        self.model = peer_models.huggingface_model(family, SHAPES[shape])
        if mode == "bf16":
            self.model.to(torch.bfloat16)
        self.model.train()
        self.forward = torch.compile(self.model) if compiled else self.model
        options = {"lr": RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": DECAY, "fused": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)
        self.ids = torch.from_numpy(token_ids(SHAPES[shape]))

    def _loss(self) -> Any:
        with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.mode == "amp"):
            return self.forward(input_ids=self.ids, labels=self.ids).loss

    def step(self) -> None:
        self._loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def load(self, path: str) -> None:
        peer_models.load_huggingface_model(self.model, path)

    def gradients(self, path: str) -> None:
        loss = self._loss()
        loss.backward()
        last, inner = self.model.model.layers[-1].mlp, self.model.model
        found = {
            "loss": loss.detach(),
            "norm": inner.norm.weight.grad,
            "query": inner.layers[0].self_attn.q_proj.weight.grad.T,
            "gate_up": last.experts.gate_up_proj.grad.transpose(1, 2),
            "router": last.gate.weight.grad.T,
        }
        np.savez(path, **{name: tensor.float().numpy() for name, tensor in found.items()})
        self.optimizer.zero_grad(set_to_none=True)


class PaddleNLP(worker.Contender):
    """A causal language model of PaddleNLP with Paddle's AdamW."""

    def __init__(self, family: str, shape: str) -> None:
        self.model = peer_models.paddlenlp_model(family, SHAPES[shape])
        import paddle

        self.model.train()
        self.optimizer = paddle.optimizer.AdamW(RATE, *BETAS, EPSILON, self.model.parameters(), DECAY)
        self.ids = paddle.to_tensor(token_ids(SHAPES[shape]))
        self.labels = paddle.concat([self.ids[:, 1:], paddle.full_like(self.ids[:, :1], -100)], axis=1)

    def step(self) -> None:
        out = self.model(input_ids=self.ids, labels=self.labels)
        (out[0] if isinstance(out, tuple) else out).backward()
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)


class PaddleFormers(worker.Contender):
    """PaddleFormers' Ernie-4.5-MoE as shipped, which needs kernels that Paddle has for GPUs alone."""

    def __init__(self, shape: str) -> None:
        self.model = peer_models.paddleformers_model(SHAPES[shape])
        import paddle

        self.model.train()
        self.optimizer = paddle.optimizer.AdamW(RATE, *BETAS, EPSILON, self.model.parameters(), DECAY)
        self.ids = paddle.to_tensor(token_ids(SHAPES[shape]))

    def step(self) -> None:
        out = self.model(input_ids=self.ids, labels=self.ids)
        (out[0] if isinstance(out, tuple) else out).backward()
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)


def contenders(shape: str, dtype: str, options: Any) -> list[Contender]:
    """Ours first. ``--all`` adds the peers' settings that were slower wherever they were tried."""
    found = [Contender("ours", peers.OURS, Ours, {"shape": shape, "dtype": dtype})]
    modes = {"fp32": ["fp32"], "bf16": ["bf16", "amp"]}[dtype]
    for family, name in (("ernie", "HF Ernie-4.5-MoE"), ("qwen3", "HF Qwen3-MoE")):
        for mode in modes:
            settings = {"family": family, "shape": shape, "mode": mode}
            found.append(Contender(f"{name}, {mode}", peers.TORCH, HuggingFace, settings))
            if options.all:
                compiled = {**settings, "compiled": True}
                found.append(Contender(f"{name}, {mode}, compiled", peers.TORCH, HuggingFace, compiled))
    if dtype == "fp32":
        for family, name in (("qwen2", "PaddleNLP Qwen2-MoE"), ("mixtral", "PaddleNLP Mixtral")):
            found.append(Contender(name, peers.PADDLENLP, PaddleNLP, {"family": family, "shape": shape}))
        found.append(Contender("PaddleFormers Ernie-4.5-MoE", peers.PADDLEFORMERS, PaddleFormers, {"shape": shape}))
    return common.chosen(found, options)


def check_gradients(field: common.Field, dtype: str) -> dict[str, float]:
    """Ours against Ernie-4.5-MoE of transformers with the same weights: loss and gradients. The error of each."""
    rivals = [name for name in field.workers if name.startswith("HF Ernie") and "compiled" not in name]
    if "ours" not in field.workers or not rivals:
        return {}
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        weights, paths = (
            f"{folder}/weights.npz",
            {name: f"{folder}/{i}.npz" for i, name in enumerate(("ours", *rivals))},
        )
        field.workers["ours"].call("save", path=weights)
        for name in rivals:
            field.workers[name].call("load", path=weights)
        for name, path in paths.items():
            field.workers[name].call("gradients", path=path)
        ours = dict(np.load(paths["ours"]))
        for name in rivals:
            with np.load(paths[name]) as theirs:
                errors[name] = max(common.relative_error(ours[key], theirs[key]) for key in ours)
    if min(errors.values()) > ALLOWED[dtype]:
        field.drop("ours", f"wrong result: gradients differ from Ernie-4.5-MoE of transformers by {errors}")
    return errors


def floor_seconds(shape: Shape, rates: dict[str, float]) -> tuple[float, float]:
    """(matrix products, AdamW) of one fp32 step at the machine's rates; attention counts its visible half."""
    width = shape.head_dim * (shape.heads + shape.kv_heads)
    moe = 3 * shape.hidden * (shape.top_k * shape.width + shape.shared) + shape.hidden * shape.experts
    attention = shape.heads * shape.head_dim * shape.length  # scores and their product with v, half of each
    layer = 2 * shape.hidden * width + moe + attention
    products = 2 * 3 * shape.tokens * (shape.layers * layer + shape.hidden * shape.vocabulary)
    return products / rates["sgemm"], 28 * parameters(shape) / rates["copy"]


def parameters(shape: Shape) -> int:
    experts = 3 * shape.hidden * (shape.experts * shape.width + shape.shared) + shape.hidden * shape.experts
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    return shape.layers * (experts + attention) + shape.hidden * shape.vocabulary


def measure(shape: Shape, dtype: str, options: Any, report: common.Report, rates: dict[str, float]) -> None:
    label = f"_{shape.name.lower()}"
    with common.Field(contenders(shape.name, dtype, options), options) as field:
        errors = check_gradients(field, dtype)
        times = common.interleave(field, options.rounds)
        memory = field.each(lambda w: w.ask("memory", count=2))
    seconds = common.medians(times)
    rivals = [name for name in seconds if name != "ours"]
    report.speedup(f"{dtype}_speedup_vs_best_peer{label}", seconds, rivals)
    report_memory(report, dtype, label, seconds, memory)
    rows = []
    if dtype == "fp32":
        products, update = floor_seconds(shape, rates)
        name = f"floor: {products * 1e3:.0f} ms products + {update * 1e3:.0f} ms AdamW"
        rows.append((name, shape.tokens / (products + update), None, None, None, None))
        report.ratio(f"fp32_fraction_of_floor{label}", seconds, products + update)
    for name in sorted(seconds, key=seconds.get):
        used = [memory[name]["peak"] / 2**20, memory[name]["before"] / 2**20] if name in memory else [None, None]
        error = f"{errors[name]:.1e}" if name in errors else None
        rows.append((name, shape.tokens / seconds[name], common.spread(times[name]), *used, error))
    columns = ["contender", "tokens/s", "scatter", "peak MB", "between steps", "differs from ours"]
    report.table(f"{shape.name}, {dtype}", columns, rows)
    report.failures(field.failed)


def report_memory(
    report: common.Report, dtype: str, label: str, seconds: dict[str, float], memory: dict[str, dict[str, int]]
) -> None:
    """Peak of the whole process against the fastest peer's, fp32 under the plain name."""
    fastest = common.best(seconds, [name for name in memory if name != "ours"])
    if fastest is None or "ours" not in memory:
        return
    prefix = "" if dtype == "fp32" else f"{dtype}_"
    report.figure(f"{prefix}peak_memory_vs_best_peer{label}", memory["ours"]["peak"] / memory[fastest[0]]["peak"])


def main() -> int:
    parser = common.argument_parser(__doc__, rounds=9)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="*", default=list(ALLOWED), choices=list(ALLOWED))
    options = parser.parse_args()
    report = common.Report("Whole training step", options)
    rates = floor.measure(options)
    report.table("Machine", ["rate", "value"], floor.rows(rates))
    for dtype in options.dtypes:
        for shape in options.shapes:
            measure(SHAPES[shape], dtype, options, report, rates)
    for name, choose in FIGURES.items():
        report.worst(name, [shape.lower() for shape in options.shapes], choose)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
