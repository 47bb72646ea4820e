"""Checkpoints that are complete or absent, and free of layout: tensors go by the model's own parameter names.

``run_dir/checkpoints/step-N/`` holds ``model.safetensors`` (parameters and buffers), ``config.json``,
``optimizer.safetensors`` (AdamW moments), ``training.json`` (schedule, data cursor, random states),
``trainer_state.json`` (PaddleNLP's) and ``train_log.jsonl`` (metrics so far).
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ernie5.files import read_versioned_json

FORMAT_VERSION = 1
WEIGHTS, MOMENTS, TRAINING = "model.safetensors", "optimizer.safetensors", "training.json"
FINAL = "final"
_STEP = re.compile(r"step-(\d+)$")


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest step first. A folder gets its name only when complete."""
    found = [path for path in checkpoints_dir(run_dir).glob("step-*") if _STEP.match(path.name)]
    return sorted(found, key=lambda path: int(_STEP.match(path.name)[1]))


def remove_old(run_dir: Path, keep: int | None) -> None:
    """Removes folders a kill left half-written, and all but the ``keep`` newest checkpoints (None or 0 = keep all)."""
    for leftover in checkpoints_dir(run_dir).glob(".*.partial"):
        shutil.rmtree(leftover)
    for path in step_checkpoints(run_dir)[: -keep if keep else 0]:
        shutil.rmtree(path)


def forget_run(run_dir: Path) -> None:
    """Removes what training wrote into ``run_dir`` (checkpoints, final weights, log, dashboards), to start afresh."""
    for folder in (checkpoints_dir(run_dir), run_dir / "vdl"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in [run_dir / "train_log.jsonl", *run_dir.glob("nonfinite_step_*")]:
        file.unlink(missing_ok=True)


def load_weights(model: nn.Layer, folder: Path) -> None:
    """Fills parameters and buffers in place. ``ValueError`` names the first tensor missing, extra or misshapen."""
    saved = _load_tensors(folder / WEIGHTS)
    state = model.state_dict()
    refusal = f"{folder / WEIGHTS} is a checkpoint of another shape"
    remedy = "use the configuration it was trained with, or start afresh in another run.dir"
    for name, tensor in state.items():
        if name not in saved:
            raise ValueError(f"{refusal}: '{name}' {list(tensor.shape)} of the model is not in it; {remedy}")
        if list(saved[name].shape) != list(tensor.shape):
            found, expected = list(saved[name].shape), list(tensor.shape)
            raise ValueError(f"{refusal}: '{name}' is {found}, the model expects {expected}; {remedy}")
    for name in saved:
        if name not in state:
            raise ValueError(f"{refusal}: the model has no '{name}'; {remedy}")
    for name, tensor in state.items():
        tensor.set_value(saved[name])


def save_optimizer(model: nn.Layer, optimizer: paddle.optimizer.AdamW, folder: Path) -> None:
    """Every accumulator of ``optimizer`` as ``parameter name|accumulator``."""
    names = {p.name: name for name, p in model.named_parameters()}
    save_file(
        {
            f"{names[parameter]}|{kind}": tensor.numpy()
            for kind, accumulators in optimizer._accumulators.items()
            for parameter, tensor in accumulators.items()
        },
        folder / MOMENTS,
    )


def load_optimizer(model: nn.Layer, optimizer: paddle.optimizer.AdamW, folder: Path) -> None:
    """Restores what ``save_optimizer`` wrote. Parameters that never had a gradient have no accumulators."""
    saved = _load_tensors(folder / MOMENTS)
    parameters = dict(model.named_parameters())
    seen = {key.partition("|")[0] for key in saved}
    unknown = sorted(seen - parameters.keys())
    if unknown:
        raise ValueError(f"{folder / MOMENTS}: moments of '{unknown[0]}', which the model does not have; start afresh")
    with paddle.no_grad():
        block = paddle.base.default_main_program().global_block()
        optimizer._create_accumulators(block, [parameters[name] for name in sorted(seen)])
    for key, value in saved.items():
        name, _, kind = key.partition("|")
        optimizer._accumulators[kind][parameters[name].name].set_value(value)


def save_training(folder: Path, step: int, rows_consumed: int, learning_rate: dict) -> None:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 (the global one, for code that draws from it)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    state = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "rows_consumed": rows_consumed,
        "learning_rate": learning_rate,
        "random": {
            "python": random.getstate(),
            "numpy": numpy_state,
            "paddle": [generator.__getstate__() for generator in paddle.get_rng_state()],
        },
    }
    (folder / TRAINING).write_text(json.dumps(state), encoding="utf-8")


def read_training(folder: Path) -> dict:
    return read_versioned_json(folder / TRAINING, FORMAT_VERSION, "training state", "start afresh in another run.dir")


def restore_random(state: dict) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    state["numpy"]["state"]["key"] = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"])  # noqa: NPY002
    generators = paddle.get_rng_state()
    if len(generators) != len(state["paddle"]):
        raise ValueError(
            f"the checkpoint holds {len(state['paddle'])} device random states, this machine has {len(generators)}; "
            "resume on as many devices"
        )
    fresh = [type(generator).__new__(type(generator)) for generator in generators]
    for generator, saved in zip(fresh, state["paddle"], strict=True):
        generator.__setstate__(tuple(saved))  # on a used object this would not take effect
    paddle.set_rng_state(fresh)


def _load_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; the checkpoint is incomplete, resume from another one") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: unreadable ({error}); resume from another checkpoint") from None
