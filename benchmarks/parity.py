"""Every parallel layout against one process: losses and gradient norm of every step, first gradients, final parameters.

    python benchmarks/parity.py [--layouts dp2 tp2.pp2] [--dtype float32] --json parity.json

A tiny model trains for some steps on packed rows of all four modalities, with AdamW, clipping, MTP and aux-loss-free
router bias, once in one process and once in each layout, as real processes over gloo. In float64 everything runs on the
reference ops, where a wrong gradient cannot hide behind rounding or a flipped route. Differences are relative to the
largest entry of a tensor, and the figures are the largest of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ernie5.config.schema import ParallelConfig  # noqa: E402
from ernie5.files import write_json  # noqa: E402

LAYOUTS: dict[str, tuple[int, dict]] = {  # name -> (processes, degrees)
    "dp2": (2, {}),
    "dp4": (4, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "pp4": (4, {"pipeline": 4}),
    "pp2-virtual2": (2, {"pipeline": 2, "virtual_stages": 2}),
    "ep2": (2, {"expert": 2}),
    "ep4": (4, {"expert": 4}),
    "ep2-overlapped": (2, {"expert": 2, "dispatcher": "all_to_all_overlapped"}),
    "zero1x2": (2, {"sharding": 2}),
    "zero2x2": (2, {"sharding": 2, "sharding_stage": 2}),
    "zero1x4.ep2": (4, {"expert": 2, "sharding": 4}),
    "zero1x2.dp2.ep2": (4, {"expert": 2, "sharding": 2}),
    "zero2x4.ep2": (4, {"expert": 2, "sharding": 4, "sharding_stage": 2}),
    "zero1x2.tp2": (4, {"sharding": 2, "tensor": 2}),
    "zero2x2.tp2.ep2": (4, {"sharding": 2, "sharding_stage": 2, "tensor": 2, "expert": 2}),
    "zero2x2.cp2.ep2": (4, {"sharding": 2, "sharding_stage": 2, "context": 2, "expert": 2}),
    "zero2x2.pp2": (4, {"sharding": 2, "sharding_stage": 2, "pipeline": 2}),
    "zero2x2.pp2-virtual2": (4, {"sharding": 2, "sharding_stage": 2, "pipeline": 2, "virtual_stages": 2}),
    "zero2x2.pp2.tp2.ep2": (8, {"sharding": 2, "sharding_stage": 2, "pipeline": 2, "tensor": 2, "expert": 2}),
    "cp2": (2, {"context": 2}),
    "tp2.pp2": (4, {"tensor": 2, "pipeline": 2}),
    "dp2.tp2": (4, {"tensor": 2}),
    "ep2.tp2": (4, {"expert": 2, "tensor": 2}),
    "pp2.ep2": (4, {"pipeline": 2, "expert": 2}),
    "ep2.pp2.tp2": (8, {"expert": 2, "pipeline": 2, "tensor": 2}),
    "cp2.ep2": (4, {"context": 2, "expert": 2}),
}
LIMITS = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 0.03}  # in the narrow ones of the loss alone
STEPS, ROWS, SECONDS = 20, 4, 600  # rows of a step, over all processes, each a micro-batch
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "experts_per_token": 2,
    "expert_intermediate_size": 12,
    "shared_expert_intermediate_size": 8,
    "rope_base": 1.0e4,
    "initializer_range": 0.2,
    "max_sequence_length": 96,
    "vision_bits": 6,
    "vision_num_scales": 3,
    "vision_cnn_dim": 8,
    "vision_vit_dim": 8,
    "merger_heads": 2,
    "audio_levels": 2,
    "audio_codebook_size": 12,
    "speaker_dim": 5,
}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.worker:
        work(options.worker, options.dtype, options.steps, json.loads(options.changes), Path(options.out))
        return 0
    names = options.layouts or list(LAYOUTS)
    unknown = [name for name in names if name not in LAYOUTS]
    if unknown:
        print(f"parity: no layout {unknown[0]!r}; there are {', '.join(LAYOUTS)}", file=sys.stderr)
        return 2
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        expected = run("one", 1, options, Path(folder))
        for name in names:
            started = time.perf_counter()
            found = run(name, LAYOUTS[name][0], options, Path(folder))
            differences = compare(expected, found)
            figures |= {f"{kind}:{name}": value for kind, value in differences.items()}
            shown = ", ".join(f"{kind} {value:.1e}" for kind, value in differences.items())
            print(f"{name:20} {shown} ({time.perf_counter() - started:.0f} s)", flush=True)
    if options.json:
        about = {"dtype": options.dtype, "steps": options.steps, "rows": ROWS, "changes": json.loads(options.changes)}
        write_json(Path(options.json), {"figures": figures, **about})
    limit = LIMITS[options.dtype]
    judged = {k: v for k, v in figures.items() if options.dtype == "float64" or k.startswith("loss")}
    return 0 if all(value <= limit for value in judged.values()) else 1


def run(name: str, ranks: int, options: argparse.Namespace, folder: Path) -> dict[str, np.ndarray]:
    """What ``work`` saved for the layout."""
    from ernie5.parallel.launch import launch

    out = folder / f"{name}.npz"
    kernels = {"ERNIE5_KERNELS": "reference"} if options.dtype == "float64" else {}
    command = [sys.executable, __file__, "--worker", name, "--dtype", options.dtype, "--steps", str(options.steps)]
    launch([*command, "--changes", options.changes, "--out", str(out)], ranks, SECONDS, kernels)
    with np.load(out) as saved:
        return dict(saved)


def compare(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest relative difference of each kind; raises if one side has what the other has not."""
    assert expected.keys() == found.keys(), sorted(expected.keys() ^ found.keys())
    worst = {"loss": 0.0, "norm": 0.0, "gradients": 0.0, "parameters": 0.0}
    for key, value in expected.items():
        kind = key.partition("/")[0]
        scale = np.abs(value) if kind == "loss" else np.abs(value).max()
        difference = np.abs(found[key] - value) / np.maximum(scale, 1e-12)
        worst[kind] = max(worst[kind], float(np.nan_to_num(difference, nan=np.inf).max()))
    return worst


# ------------------------------------------------------------------------------------------------ inside the processes


def work(name: str, dtype: str, steps: int, changes: dict, out: Path) -> None:
    """Trains in the layout ``name`` ("one": a single process without any of it); rank 0 saves what is compared."""
    import paddle

    from ernie5.model import Ernie5Config

    half = dtype == "bfloat16"
    paddle.set_default_dtype("float32" if half else dtype)
    config = Ernie5Config(**{**SHAPE, **changes})
    run = _One(config, half) if name == "one" else _Many(config, ParallelConfig(**LAYOUTS[name][1]), half)
    rows, results = Rows(), {}
    for step in range(steps):
        losses = run.forward_backward(rows, step)
        results |= {f"loss/{step}/{kind}": np.float64(value) for kind, value in losses.items()}
        if step == 0:
            results |= {f"gradients/{key}": value for key, value in run.gradients().items()}
        run.update(losses)
        results[f"norm/{step}"] = np.float64(run.clip.norm)
    results |= {f"parameters/{key}": value for key, value in run.parameters().items()}
    if os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
        np.savez(out, **results)


BIAS_SPEED = 1.0e-3


def _clip() -> object:
    from ernie5.trainer.optimizer import GuardedClip

    def refuse(norm: float) -> None:
        raise ValueError(f"gradient norm {norm}")

    return GuardedClip(1.0, refuse)


def _optimizer(model: object, clip: object) -> object:
    from ernie5.trainer.optimizer import build_optimizer

    return build_optimizer(model, 1.0e-2, (0.9, 0.95), 1.0e-8, 0.1, clip)


class _One:
    """The ordinary model, micro-batch after micro-batch."""

    def __init__(self, config: object, bf16: bool) -> None:
        import paddle

        from ernie5.model import Ernie5ForCausalLM

        self.model, self.dtype = Ernie5ForCausalLM(config, seed=1), paddle.get_default_dtype()
        if bf16:
            self.model.to_bfloat16()
        self.model.train()
        self.clip = _clip()
        self.optimizer = _optimizer(self.model, self.clip)

    def forward_backward(self, rows: Rows, step: int) -> dict[str, float]:
        import paddle

        from ernie5.model.losses import total_weights

        batches = [rows.batch([step * ROWS + i]) for i in range(ROWS)]
        total, sums = total_weights(batches), {}
        for batch in batches:
            tensors = {
                name: paddle.to_tensor(value.astype(self.dtype) if value.dtype.kind == "f" else value)
                for name, value in batch.items()
            }
            outputs = self.model(total=total, **tensors)
            outputs["loss"].backward()
            for name, value in {"loss": outputs["loss"], **outputs["losses"]}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def gradients(self) -> dict[str, np.ndarray]:
        return {name: array(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}

    def update(self, losses: dict[str, float]) -> None:
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)
        self.model.loss_weights.observe(losses)
        self.model.update_router_bias(BIAS_SPEED)

    def parameters(self) -> dict[str, np.ndarray]:
        biases = {n: b.numpy() for n, b in self.model.named_buffers() if n.endswith("correction_bias")}
        return {**{name: array(p) for name, p in self.model.named_parameters()}, **biases}


class _Many:
    """The same in one of the processes of a layout."""

    def __init__(self, config: object, parallel: ParallelConfig, bf16: bool) -> None:
        from ernie5.parallel.worker import Worker

        self.worker = Worker(config, parallel, 1, bf16)
        self.model = self.worker.model
        self.model.train()
        self.clip = _clip()
        self.optimizer = self.worker.optimizer(_optimizer(self.model, self.clip))

    def forward_backward(self, rows: Rows, step: int) -> dict[str, float]:
        layout = self.worker.topology.layout
        count = ROWS // layout.rows
        first = step * ROWS + layout.row_of(self.worker.topology.rank)
        losses = self.worker.forward_backward([rows.batch([first + i * layout.rows]) for i in range(count)])
        return {name: value for name, value in losses.items() if name != "tokens"}

    def gradients(self) -> dict[str, np.ndarray]:
        found = {name: array(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}
        return self.worker.gather_whole(found) or {}

    def update(self, losses: dict[str, float]) -> None:
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)
        self.worker.finish_step(losses, BIAS_SPEED)

    def parameters(self) -> dict[str, np.ndarray]:
        values = {name: array(p) for name, p in self.model.named_parameters()}
        biases = {n: b.numpy() for n, b in self.model.named_buffers() if n.endswith("correction_bias")}
        return {**(self.worker.gather_whole(values) or {}), **(self.worker.gather_whole(biases) or {})}


def array(tensor: object) -> np.ndarray:
    """In float32 where NumPy has no such numbers."""
    return (tensor.astype("float32") if str(tensor.dtype).endswith("bfloat16") else tensor).numpy()


class Rows:
    """Row i: samples of every modality, packed; codes are random, but every second letter can be learnt."""

    def __init__(self) -> None:
        from ernie5.sequence.spec import LayoutSpec

        s = SHAPE
        self.spec = LayoutSpec(
            length=s["max_sequence_length"],
            scales=(1, 2, 3),
            bits=s["vision_bits"],
            max_bits=s["vision_bits"],
            levels=s["audio_levels"],
            codebook_size=s["audio_codebook_size"],
            speaker_dim=s["speaker_dim"],
            cnn_dim=s["vision_cnn_dim"],
            vit_dim=s["vision_vit_dim"],
        )

    def batch(self, numbers: list[int]) -> dict[str, np.ndarray]:
        from ernie5.sequence.packing import collate, pack

        return collate([pack(self._documents(np.random.default_rng([3, i])), self.spec.length) for i in numbers])

    def _documents(self, rng: np.random.Generator) -> list:
        from ernie5.sequence.layout import lay_out

        samples = self._samples(rng)
        documents, room = [], self.spec.length
        for i in rng.permutation(len(samples)):
            document = lay_out(samples[i], self, self.spec)
            if len(document) <= room:
                documents.append(document)
                room -= len(document)
        return documents

    def _samples(self, rng: np.random.Generator) -> list:
        from ernie5.sequence.parts import AudioCodes, Sample, SpeakerEmbedding, Text, VisionFeatures, VisionLatent

        spec, side = self.spec, self.spec.scales[-1]

        def words(count: int, loss: bool = True) -> Text:
            return Text("".join(2 * chr(97 + letter) for letter in rng.integers(0, 26, count)), loss=loss)

        def drawn(frames: int) -> VisionLatent:
            return VisionLatent({spec.bits: rng.standard_normal((frames, side, side, spec.bits))}, video=frames > 1)

        def seen(frames: int) -> VisionFeatures:
            cnn, vit = rng.standard_normal((2, frames * 4, 4 if frames == 1 else 16, spec.cnn_dim))
            return VisionFeatures(cnn, vit, (frames, 2, 2), video=frames > 1)

        def heard(count: int, generate: bool) -> AudioCodes:
            return AudioCodes(rng.integers(0, spec.codebook_size, (count, spec.levels)), generate)

        voice = SpeakerEmbedding(rng.standard_normal(spec.speaker_dim))
        return [
            Sample([words(6)]),
            Sample([words(2), drawn(1)]),
            Sample([words(2), drawn(3)]),
            Sample([seen(1), words(2, False), words(2)]),
            Sample([seen(2), words(2)]),
            Sample([heard(5, False), words(2)]),
            Sample([words(2), voice, heard(4, True)]),
        ]

    def encode(self, text: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        """One id a letter."""
        return [16 + ord(letter) % 40 for letter in text]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", default=[], help=f"out of {', '.join(LAYOUTS)}")
    parser.add_argument("--dtype", choices=sorted(LIMITS), default="float64")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--changes", default="{}", help='fields of the model to change, such as {"recompute": true}')
    parser.add_argument("--json", help="where the figures go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
