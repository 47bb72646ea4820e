"""Initial values from the parameter's global name and the seed, so that every layout starts from the same model."""

from __future__ import annotations

import hashlib

import numpy as np
import paddle
from paddle import nn


def named_generator(name: str, seed: int) -> np.random.Generator:
    """A generator that depends on ``name`` and ``seed`` alone, on every machine and in every process."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def initialise(model: nn.Layer, seed: int, std: float, num_layers: int) -> None:
    """Fills every parameter in place: norms 1, biases 0, matrices normal.

    Matrices get ``std``, those that write into the residual stream ``std / sqrt(2 * num_layers)``; ``std = 0`` means
    1/sqrt(fan-in) for all of them.
    """
    for name, parameter in model.named_parameters():
        value = initial_value(name, parameter.shape, seed, std, num_layers)
        parameter.set_value(paddle.to_tensor(value.astype(str(parameter.dtype).rsplit(".", 1)[-1])))


def initial_value(name: str, shape: list[int], seed: int, std: float, num_layers: int) -> np.ndarray:
    """The first value of the parameter ``name``, whole."""
    if name.rsplit(".", 1)[-1] == "bias":
        return np.zeros(shape)
    if len(shape) == 1:
        return np.ones(shape)
    scale = std if std > 0 else shape[-2] ** -0.5
    if name.endswith(("o_proj.weight", "experts.down", "shared.down")):
        scale *= (2 * num_layers) ** -0.5
    return named_generator(name, seed).standard_normal(shape, dtype=np.float32) * scale
