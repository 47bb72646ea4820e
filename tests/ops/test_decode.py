"""The decoding kernel against the model's own blocks, and the cache that both write."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import paddle
import pytest

from ernie5.model.decoding import decode_weights
from ernie5.model.layers import LayerCache
from ernie5.ops import kernels
from ernie5.ops.decode import MATRICES, MOST_TOKENS, DecodeCache, DecodeStep
from tests.model.helpers import tiny_model

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
CHUNKS = (5, 1, 1, 3, 1, 70, 1, 2)
pytestmark = pytest.mark.skipif(not kernels.available("decode_step"), reason="no compiled kernels on this machine")


@pytest.fixture(autouse=True)
def no_grad():
    with paddle.no_grad():
        yield


def model_of(**changes: object):
    model = tiny_model("float32", **changes)
    model.eval()
    for i, router in enumerate(model.routers()):
        bias = np.random.default_rng(i).normal(0, 0.1, router.correction_bias.shape)
        router.correction_bias.set_value(paddle.to_tensor(bias.astype(np.float32)))
    return model


def cache_of(model) -> DecodeCache:
    cache = model.new_cache()
    assert cache.step is not None
    return cache


def fields(batch: int, columns: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A causal batch, the first sequence padded on the left, with columns that end early."""
    rng = np.random.default_rng(seed)
    intervals = np.zeros((batch, 1, columns, 4), np.int32)
    own, valid = np.arange(columns), np.ones((batch, columns), bool)
    intervals[..., 0] = np.where(rng.random((batch, 1, columns)) < 0.3, own + 2, columns)
    intervals[..., 1], intervals[..., 3] = columns, own
    valid[0, :3] = False
    intervals[0, 0, :3, 0] = own[:3] + 1
    return {
        "ids": rng.integers(16, 64, (batch, columns)),
        "positions": np.repeat(own[None, :, None], 3, 2).repeat(batch, 0).astype(np.float32),
        "intervals": intervals,
        "valid": valid,
    }


def walk(model, data: dict[str, np.ndarray], cache, chunks=CHUNKS, start: int = 0, segments=(0, 3)) -> np.ndarray:
    """Hidden states [B,S,D] of the columns from ``start``, chunk by chunk, layers in segments."""
    parts = []
    for size in chunks:
        stop = start + size
        columns = slice(start, stop)
        hidden = model.embedding.tokens(paddle.to_tensor(data["ids"][:, columns]))
        given = (
            paddle.to_tensor(data["positions"][:, columns]),
            paddle.to_tensor(np.ascontiguousarray(data["intervals"][:, :, :stop])),
            paddle.to_tensor(data["valid"][:, columns]),
        )
        for first, last in pairwise(segments):
            hidden = model.run_layers(hidden, *given, cache, start, first, last)
        parts.append(hidden.numpy())
        start = stop
    return np.concatenate(parts, axis=1)


def by_blocks(model, data: dict[str, np.ndarray], chunks: tuple[int, ...] = CHUNKS) -> np.ndarray:
    return walk(model, data, [LayerCache() for _ in model.layers], chunks)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router_activation": "softmax", "routed_scaling_factor": 2.5},
        {"shared_expert_intermediate_size": 0},
        {"num_kv_heads": 4, "head_dim": 6, "experts_per_token": 8},
        {"hidden_size": 80, "num_kv_heads": 1, "head_dim": 32, "expert_intermediate_size": 33},
    ],
    ids=["plain", "softmax", "no shared", "all experts", "wide"],
)
@pytest.mark.parametrize("segments", [(0, 3), (0, 1, 2, 3)], ids=["one call", "a call a layer"])
def test_equals_the_blocks(changes: dict, segments: tuple[int, ...]) -> None:
    model, data = model_of(**changes), fields(3, sum(CHUNKS))
    cache = cache_of(model)
    found = walk(model, data, cache, segments=segments)
    np.testing.assert_allclose(found, by_blocks(model, data), **TOLERANCE)
    assert cache.lengths == [sum(CHUNKS)] * 3


def test_blocks_and_kernel_share_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = model_of(), fields(2, sum(CHUNKS))
    cache = cache_of(model)
    monkeypatch.setattr(cache.step, "takes", lambda tokens: tokens < 5)
    np.testing.assert_allclose(walk(model, data, cache), by_blocks(model, data), **TOLERANCE)


def test_a_long_prompt_and_gradients_are_left_to_the_blocks() -> None:
    step = cache_of(model_of()).step
    assert step.takes(MOST_TOKENS) and not step.takes(MOST_TOKENS + 1)
    with paddle.enable_grad():
        assert not step.takes(1)


def test_text_in_one_call() -> None:
    model, data = model_of(), fields(3, 9)
    cache = cache_of(model)
    hidden, none = cache.step.run(None, *_tensors(data, 0, 8), cache, ids=paddle.to_tensor(data["ids"][:, :8]))
    assert none.shape == [0]
    whole = {"ids": paddle.to_tensor(data["ids"]), "rows": 1, "logits": True}
    state, logits = cache.step.run(None, *_tensors(data, 0, 9), cache, 8, **whole)
    expected = by_blocks(model, data, (8, 1))
    np.testing.assert_allclose(np.concatenate([hidden, state], 1), expected, **TOLERANCE)
    wanted = model.text_logits(paddle.to_tensor(expected[:, -1])).numpy()
    np.testing.assert_allclose(logits.numpy(), wanted, **TOLERANCE)


def _tensors(data: dict[str, np.ndarray], start: int, stop: int) -> list[paddle.Tensor]:
    """Intervals of every column, later ones too, which are not read."""
    parts = (data["positions"][:, start:stop], data["intervals"], data["valid"][:, start:stop])
    return [paddle.to_tensor(part) for part in parts]


MATRIX_UNIT = {"hidden_size": 96, "head_dim": 32, "expert_intermediate_size": 48, "vocab_size": 72}


@pytest.mark.parametrize(
    ("changes", "batch"),
    [({}, 2), *((MATRIX_UNIT, batch) for batch in (2, 3, 5, 8, 10, 11, 16, 17))],
    ids=lambda value: ("odd sizes" if not value else "whole tiles") if isinstance(value, dict) else None,
)
def test_bfloat16_weights_give_what_their_values_give(changes: dict, batch: int) -> None:
    model, data = model_of(**changes), fields(batch, 12)
    weights = decode_weights(model)
    tensors = [weights.embedding, *(layer[name] for layer in weights.layers for name in MATRICES)]
    for tensor in tensors:
        tensor.set_value(tensor.astype("bfloat16").astype("float32"))
    expected = in_two_calls(cache_of(model), data)
    weights.embedding = weights.embedding.astype("bfloat16")
    for layer in weights.layers:
        layer |= {name: layer[name].astype("bfloat16") for name in MATRICES}
    step = DecodeStep(weights)
    found = in_two_calls(DecodeCache(step.layers, step.groups, step.head_dim, step), data)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, **TOLERANCE)


def in_two_calls(cache: DecodeCache, data: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Hidden states of 11 columns, those of the twelfth, and its logits."""
    given = {"ids": paddle.to_tensor(data["ids"])}
    first, _ = cache.step.run(None, *_tensors(data, 0, 11), cache, ids=given["ids"][:, :11])
    last, logits = cache.step.run(None, *_tensors(data, 0, 12), cache, 11, **given, rows=1, logits=True)
    return [first.numpy(), last.numpy(), logits.numpy()]


def test_changed_weights_are_seen() -> None:
    model, data = model_of(), fields(1, 4)
    cache = cache_of(model)
    before = walk(model, data, cache, (4,))
    model.layers[1].attention.k_proj.weight.set_value(model.layers[1].attention.k_proj.weight * 2)
    model.layers[0].moe.experts.gate_up.set_value(model.layers[0].moe.experts.gate_up * 2)
    for step in (cache.step, cache_of(model).step):
        fresh = DecodeCache(step.layers, step.groups, step.head_dim, step)
        after = walk(model, data, fresh, (4,))
        assert np.abs(after - before).max() > 1e-2
        np.testing.assert_allclose(after, by_blocks(model, data, (4,)), **TOLERANCE)


def test_rows_that_do_not_follow_the_cache_are_refused() -> None:
    model, data = model_of(), fields(2, 10)
    cache = cache_of(model)
    walk(model, data, cache, (6,))
    with pytest.raises(AssertionError, match="cannot follow"):
        walk(model, data, cache, (1,), start=4)


def test_a_cache_grows_by_doubling() -> None:
    cache = DecodeCache(2, 1, 4)
    sizes = []
    for start in range(300):
        cache.extend(2, start, start + 1, 0, 2)
        sizes.append(cache.capacity)
    assert sorted(set(sizes)) == [64, 128, 256, 512]


def test_an_unknown_id_is_refused() -> None:
    model, data = model_of(), fields(1, 1)
    cache = cache_of(model)
    with pytest.raises((ValueError, RuntimeError, OSError), match="not in the vocabulary"):
        cache.step.run(None, *_tensors(data, 0, 1), cache, ids=paddle.to_tensor([[64]]))
