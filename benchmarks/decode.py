#!/usr/bin/env python
"""Greedy decoding: a prompt of 128 tokens, then 128 new ones, for one sequence and for eight.

    python benchmarks/decode.py --json out.json

The time is that of the whole call, prompt included; end-of-text is switched off for everyone. Floor: the bytes of
weights that a step has to read (every routed expert once that one of the sequences chose) and of keys and values,
at the machine's read rate.

Figures: ``fp32_speedup_vs_best_peer`` compares float32 with the peers' fastest float32 setting (torch.compile
included), ``bf16_speedup_vs_best_peer`` bfloat16 with bfloat16, and ``speedup_vs_best_peer`` everyone's best setting:
our fastest precision with the fastest that any peer reaches in any precision, of those that ran.
``fraction_of_bandwidth_floor`` is the smaller one of the precisions.
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

PROMPT, NEW = 128, 128
BATCHES = (1, 8)
SPECIALS = 16
AGREE = 8  # first tokens that must be the same; later ones may part where two logits are nearly equal
SEED = 0


def prompts(batch: int, shape: Shape) -> np.ndarray:
    """int64 [batch, PROMPT], beginning with BOS."""
    ids = np.random.default_rng(SEED).integers(SPECIALS, shape.vocabulary, (batch, PROMPT))
    ids[:, 0] = 1
    return ids


class Words:
    """A text tokenizer whose texts are the numbers of their tokens; any token may follow any, none ends a text."""

    def __init__(self, size: int) -> None:
        from ernie5.tokenizers.continuations import Continuations

        self.vocab_size = size
        self.continuations = Continuations([b""] * SPECIALS + [b"\0a"] * (size - SPECIALS))

    def encode(self, text: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(i) for i in ids)


class Ours(worker.Contender):
    """``ernie5.generation.generate``."""

    def __init__(self, shape: str, dtype: str) -> None:
        self.shape, config = SHAPES[shape], peer_models.ours_config(SHAPES[shape])
        from types import SimpleNamespace

        import paddle

        from ernie5.model.modeling import Ernie5ForCausalLM

        self.model = Ernie5ForCausalLM(config)
        embedding = self.model.embedding.tokens.weight
        without = embedding.numpy()
        without[:SPECIALS] = 0.0  # so that no one's greedy choice is a special token
        embedding.set_value(paddle.to_tensor(without))
        if dtype == "bf16":
            self.model.to_bfloat16()
        self.model.eval()
        vision = SimpleNamespace(config=SimpleNamespace(scales=[1, 2]), bits_series=(config.vision_bits,))
        self.tokenizers = SimpleNamespace(text=Words(self.shape.vocabulary), vision=vision)

    def save(self, path: str) -> None:
        peer_models.save_ours(self.model, path)

    def prepare(self, batch: int) -> None:
        from ernie5.sequence.parts import Text

        self.prompts = [[Text(self.tokenizers.text.decode(row[1:]))] for row in prompts(batch, self.shape)]

    def step(self) -> None:
        self.found = ours(self.model, self.tokenizers, self.prompts)

    def outputs(self) -> dict[str, np.ndarray]:
        return {"ids": np.array([self.tokenizers.text.encode(text) for text in self.found], np.float64)}


def ours(model: Any, tokenizers: Any, given: list) -> list[str]:
    """The public call that is measured."""
    from ernie5.generation import generate

    return generate(model, tokenizers, given, "text", max_new_tokens=NEW, temperature=0.0)


class HuggingFace(worker.Contender):
    """``generate`` of transformers; compiled: with a static cache, the model's forward through torch.compile."""

    def __init__(
        self, family: str, shape: str, dtype: str, experts: str = "grouped_mm", compiled: bool = False
    ) -> None:
        import torch

        torch.manual_seed(SEED)
        self.torch, self.shape = torch, SHAPES[shape]
        self.model = peer_models.huggingface_model(family, self.shape, experts).eval()
        self.model.config.use_cache = True
        if dtype == "bf16":
            self.model.to(torch.bfloat16)
        self.options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True}
        if compiled:
            self.options["cache_implementation"] = "static"
            self.model.forward = torch.compile(self.model.forward, dynamic=False)

    def load(self, path: str) -> None:
        peer_models.load_huggingface_model(self.model, path)

    def prepare(self, batch: int) -> None:
        self.ids = self.torch.from_numpy(prompts(batch, self.shape))

    def step(self) -> None:
        mask = self.torch.ones_like(self.ids)
        with self.torch.inference_mode():
            self.found = self.model.generate(
                self.ids, attention_mask=mask, eos_token_id=None, pad_token_id=0, **self.options
            )

    def outputs(self) -> dict[str, np.ndarray]:
        return {"ids": self.found[:, PROMPT:].double().numpy()}


class PaddleNLP(worker.Contender):
    """``generate`` of PaddleNLP."""

    def __init__(self, family: str, shape: str) -> None:
        self.shape = SHAPES[shape]
        self.model = peer_models.paddlenlp_model(family, self.shape)
        self.model.eval()
        self.model.config.use_cache = True

    def prepare(self, batch: int) -> None:
        import paddle

        self.ids = paddle.to_tensor(prompts(batch, self.shape))

    def step(self) -> None:
        import paddle

        with paddle.no_grad():
            self.found = self.model.generate(
                self.ids,
                attention_mask=paddle.ones_like(self.ids),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                decode_strategy="greedy_search",
                use_cache=True,
                eos_token_id=self.shape.vocabulary - 1,
                pad_token_id=0,
            )[0]

    def outputs(self) -> dict[str, np.ndarray]:
        return {"ids": self.found.numpy().astype(np.float64)}


def contenders(shape: str, dtype: str, options: Any) -> list[Contender]:
    same = {"shape": shape, "dtype": dtype}
    found = [Contender("ours", peers.OURS, Ours, same)]
    for family, name in (("ernie", "HF Ernie-4.5-MoE"), ("qwen3", "HF Qwen3-MoE")):
        settings = {"family": family, **same}
        found.append(Contender(f"{name}, grouped_mm", peers.TORCH, HuggingFace, settings))
        compiled = {**settings, "experts": "batched_mm", "compiled": True}
        found.append(Contender(f"{name}, batched_mm, compiled", peers.TORCH, HuggingFace, compiled))
        if options.all:
            batched = {**settings, "experts": "batched_mm"}
            found.append(Contender(f"{name}, batched_mm", peers.TORCH, HuggingFace, batched))
    if dtype == "fp32":
        for family, name in (("mixtral", "PaddleNLP Mixtral"), ("qwen2", "PaddleNLP Qwen2-MoE")):
            found.append(Contender(name, peers.PADDLENLP, PaddleNLP, {"family": family, "shape": shape}))
    return common.chosen(found, options)


def share_weights(field: common.Field) -> None:
    """Gives every Ernie-4.5-MoE of transformers our weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.npz"
        if "ours" in field.workers:
            field.workers["ours"].call("save", path=path)
            field.each(lambda w: w.call("load", path=path) if w.name.startswith("HF Ernie") else None)


def check_tokens(field: common.Field, dtype: str) -> dict[str, str]:
    """How many tokens of the first sequence are ours before the first that differs."""
    found = field.each(lambda w: w.outputs()["ids"])
    agreed = {}
    for name, ids in found.items():
        if not name.startswith("HF Ernie") or "ours" not in found:
            continue
        same = np.cumprod(ids == found["ours"], axis=1).sum(1)
        agreed[name] = f"{int(same.min())} to {int(same.max())}"
        if dtype == "fp32" and "compiled" not in name and same.min() < AGREE:
            field.drop("ours", f"other tokens than Ernie-4.5-MoE of transformers after {int(same.min())}")
    return agreed


def floor_seconds(shape: Shape, batch: int, rates: dict[str, float], size: int) -> float:
    """One step's weights, and keys and values of half the new tokens, at the read rate; ``size`` bytes a weight.

    Experts are taken to be chosen evenly: of E, E (1 - (1 - k/E)^batch) are read.
    """
    chosen = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** batch)
    moe = 3 * shape.hidden * (chosen * shape.width + shape.shared)
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    weights = shape.layers * (moe + attention) + shape.hidden * shape.vocabulary
    cached = 2 * shape.layers * batch * (PROMPT + NEW / 2) * shape.kv_heads * shape.head_dim
    return (size * weights + 4 * shape.layers * shape.hidden * shape.experts + 4 * cached) / rates["read"]


def measure(
    shape: Shape, dtype: str, options: Any, report: common.Report, rates: dict[str, float]
) -> dict[int, dict[str, float]]:
    """Median seconds of every contender, by batch size."""
    found = {}
    with common.Field(contenders(shape.name, dtype, options), options) as field:
        share_weights(field)
        for batch in options.batches:
            field.each(lambda w, batch=batch: w.ask("prepare", batch=batch))
            agreed = check_tokens(field, dtype)
            times = common.interleave(field, options.rounds)
            found[batch] = seconds = common.medians(times)
            least = NEW * floor_seconds(shape, batch, rates, 4 if dtype == "fp32" else 2)
            label = f"_{shape.name.lower()}_b{batch}"
            report.speedup(f"{dtype}_speedup_vs_best_peer{label}", seconds, seconds.keys() - {"ours"})
            report.ratio(f"{dtype}_fraction_of_bandwidth_floor{label}", seconds, least)
            rows = [("floor: active weights read once a step", batch * NEW / least, None, None)]
            for name in sorted(seconds, key=seconds.get):
                rows.append((name, batch * NEW / seconds[name], common.spread(times[name]), agreed.get(name)))
            columns = ["contender", "tokens/s", "scatter", "tokens as ours"]
            report.table(f"{shape.name}, {dtype}, batch {batch}", columns, rows)
        report.failures(field.failed)
    return found


def compare_precisions(shape: Shape, measured: dict[str, dict[int, dict[str, float]]], report: common.Report) -> None:
    """Our fastest precision against the peers' fastest: ``measured`` is dtype -> batch -> contender -> seconds."""
    for batch in set.intersection(*(set(by_batch) for by_batch in measured.values())):
        seconds = [(name, value) for by_batch in measured.values() for name, value in by_batch[batch].items()]
        ours = [value for name, value in seconds if name == "ours"]
        peers_ = [value for name, value in seconds if name != "ours"]
        label = f"{shape.name.lower()}_b{batch}"
        report.figure(f"speedup_vs_best_peer_{label}", min(peers_) / min(ours) if ours and peers_ else None)
        floors = [f"{dtype}_fraction_of_bandwidth_floor_{label}" for dtype in measured]
        report.merge(f"fraction_of_bandwidth_floor_{label}", floors)


def main() -> int:
    parser = common.argument_parser(__doc__, rounds=7)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="*", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    options = parser.parse_args()
    report = common.Report("Decoding", options)
    rates = floor.measure(options)
    report.table("Machine", ["rate", "value"], floor.rows(rates))
    for shape in options.shapes:
        measured = {dtype: measure(SHAPES[shape], dtype, options, report, rates) for dtype in options.dtypes}
        compare_precisions(SHAPES[shape], measured, report)
    shapes = [shape.lower() for shape in options.shapes]
    for prefix in ("", "fp32_", "bf16_"):
        for name in ("speedup_vs_best_peer", "fraction_of_bandwidth_floor"):
            for batch in options.batches:
                report.merge(f"{prefix}{name}_b{batch}", [f"{prefix}{name}_{shape}_b{batch}" for shape in shapes])
            report.worst(prefix + name, [f"b{batch}" for batch in options.batches])
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
