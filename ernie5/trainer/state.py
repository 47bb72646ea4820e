"""What a checkpoint keeps besides tensors: step, data cursor and schedule once, random states by process."""

from __future__ import annotations

import json
import random

import numpy as np
import paddle

from ernie5.checkpoint import Checkpoint

TRAINING, TRAINER_STATE = "training.json", "trainer_state.json"


def training_text(step: int, rows_consumed: int, learning_rate: dict) -> str:
    return json.dumps({"step": step, "rows_consumed": rows_consumed, "learning_rate": learning_rate})


def read_training(checkpoint: Checkpoint) -> dict:
    return _parsed(checkpoint, TRAINING)


def random_text() -> str:
    """The states of Python's, NumPy's and Paddle's generators of this process."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 (the global one, for code that draws from it)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return json.dumps(
        {
            "python": random.getstate(),
            "numpy": numpy_state,
            "paddle": [generator.__getstate__() for generator in paddle.get_rng_state()],
        }
    )


def restore_random(checkpoint: Checkpoint, rank: int, count: int) -> None:
    """The states of process ``rank``; of the first one, where ``count`` processes are not as many as were saved."""
    state = _parsed(checkpoint, f"own-{rank if count == checkpoint.ranks else 0:05d}.json")
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


def _parsed(checkpoint: Checkpoint, name: str) -> dict:
    try:
        return json.loads(checkpoint.text(name))
    except ValueError as error:
        raise ValueError(f"{checkpoint.folder / name}: unreadable ({error}); resume from another checkpoint") from None
