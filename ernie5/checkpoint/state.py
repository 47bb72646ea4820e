"""A model and its optimizer as named tensors, and back.

Weights are float32, or wider, in a checkpoint, whatever trains: of bfloat16 ones their masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import paddle
from paddle import nn

from ernie5.checkpoint.part import Part
from ernie5.checkpoint.reading import REMEDY, Checkpoint
from ernie5.checkpoint.saving import Held

MODEL, OPTIMIZER = "model", "optimizer"
PartOf = Callable[[str], Part]  # global name of a parameter or buffer -> what is here


def held_weights(model: nn.Layer, optimizer: paddle.optimizer.Optimizer | None, part_of: PartOf) -> dict[str, Held]:
    """Parameters and buffers. Of a bfloat16 parameter its float32 master, where this process has it."""
    masters = _inner(optimizer)._master_weights if optimizer is not None else {}
    found = {}
    for name, tensor in model.state_dict().items():
        master = masters.get(tensor.name)
        source = tensor if master is None else master
        precedence = 0 if master is None else 1
        found[name] = Held(partial(_array, source), part_of(name), 4 * tensor.size, precedence)
    return found


def held_moments(model: nn.Layer, optimizer: paddle.optimizer.Optimizer, part_of: PartOf) -> dict[str, Held]:
    """Every accumulator of ``optimizer`` that is here, as ``parameter name|accumulator``."""
    inner, found = _inner(optimizer), {}
    parameters = _by_accumulator_name(model, inner)
    for kind, accumulators in inner._accumulators.items():
        for own_name, tensor in accumulators.items():
            name, parameter = parameters[own_name]
            part = part_of(name) if tensor.shape == parameter.shape else Part(tuple(tensor.shape))
            found[f"{name}|{kind}"] = Held(partial(_array, tensor), part, tensor.size * tensor.element_size())
    return found


def load_weights(model: nn.Layer, checkpoint: Checkpoint, part_of: PartOf) -> None:
    """Fills parameters and buffers in place; their names have been checked."""
    for name, tensor in model.state_dict().items():
        tensor.set_value(_as(checkpoint.read(MODEL, name, part_of(name)), tensor))


def load_moments(
    model: nn.Layer,
    optimizer: paddle.optimizer.Optimizer,
    checkpoint: Checkpoint,
    shapes: Mapping[str, Iterable[int]],
    part_of: PartOf,
) -> None:
    """Restores what ``held_moments`` found, of the parameters that this process steps.

    Parameters that never had a gradient have no accumulators. ``shapes``: of the parameters of the whole model.
    ``ValueError`` if the checkpoint has moments of another parameter, or not those this optimizer keeps.
    """
    inner, saved = _inner(optimizer), checkpoint.shapes(OPTIMIZER)
    kinds: dict[str, set[str]] = {}
    for key in saved:
        name, _, kind = key.partition("|")
        if name not in shapes:
            raise ValueError(f"{checkpoint.folder}: moments of '{name}', which the model does not have; {REMEDY}")
        kinds.setdefault(name, set()).add(kind)
    stepped = {parameter.name for parameter in inner._parameter_list}
    mine = {n: p for n, p in model.named_parameters() if n in kinds and p.name in stepped}
    with paddle.no_grad():
        block = paddle.base.default_main_program().global_block()
        inner._create_accumulators(block, list(mine.values()))
    for own_name, (name, parameter) in _by_accumulator_name(model, inner).items():
        if name in mine:
            _load_moments_of(name, parameter, own_name, inner, kinds[name], checkpoint, part_of)


def _load_moments_of(
    name: str,
    parameter: paddle.Tensor,
    own_name: str,
    inner: paddle.optimizer.Optimizer,
    saved: set[str],
    checkpoint: Checkpoint,
    part_of: PartOf,
) -> None:
    here = {kind: by_name[own_name] for kind, by_name in inner._accumulators.items() if own_name in by_name}
    if saved != here.keys():
        found, expected = ", ".join(sorted(saved)), ", ".join(sorted(here))
        raise ValueError(f"{checkpoint.folder}: '{name}' has {found}, this optimizer keeps {expected}; {REMEDY}")
    for kind, tensor in here.items():
        part = part_of(name) if tensor.shape == parameter.shape else Part(tuple(tensor.shape))
        tensor.set_value(_as(checkpoint.read(OPTIMIZER, f"{name}|{kind}", part), tensor))
    master = inner._master_weights.get(parameter.name)
    if master is not None:
        master.set_value(_as(checkpoint.read(MODEL, name, part_of(name)), master))


def _by_accumulator_name(model: nn.Layer, inner: paddle.optimizer.Optimizer) -> dict[str, tuple[str, paddle.Tensor]]:
    """Name under which an accumulator is kept -> (global name, parameter); a master's where there is one."""
    found = {}
    for name, parameter in model.named_parameters():
        master = inner._master_weights.get(parameter.name)
        found[parameter.name if master is None else master.name] = name, parameter
    return found


def _inner(optimizer: paddle.optimizer.Optimizer) -> paddle.optimizer.Optimizer:
    """The optimizer that has the accumulators; Fleet wraps it."""
    return getattr(optimizer, "_inner_opt", optimizer)


def _array(tensor: paddle.Tensor) -> np.ndarray:
    """A copy."""
    return (tensor.astype("float32") if tensor.dtype == paddle.bfloat16 else tensor).numpy()


def _as(value: np.ndarray, tensor: paddle.Tensor) -> paddle.Tensor:
    return paddle.to_tensor(value).astype(tensor.dtype)
