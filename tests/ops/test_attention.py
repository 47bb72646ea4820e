import numpy as np
import paddle
import pytest

from ernie5.ops.attention import IntervalMask, flashmask_attention


def reference(q, k, v, intervals, query_start):
    """Row by row in float64."""
    batch, length, heads, dim = q.shape
    groups = k.shape[2]
    out = np.zeros_like(q)
    for b, s, n in np.ndindex(batch, length, heads):
        row, g = s + query_start, n * groups // heads
        lts, lte, uts, ute = intervals[b, 0].T
        seen = ~(((row >= lts) & (row < lte)) | ((row >= uts) & (row < ute)))
        scores = k[b, seen, g] @ q[b, s, n] / np.sqrt(dim)
        weights = np.exp(scores - scores.max())
        out[b, s, n] = weights / weights.sum() @ v[b, seen, g]
    return out


def random_intervals(rng, batch, length):
    columns = np.arange(length)
    start = columns - rng.integers(0, 4, (batch, length)).clip(max=columns)
    until = np.minimum(columns + rng.integers(1, length + 1, (batch, length)), length)
    full = np.full((batch, length), length)
    return np.stack([until, full, np.zeros_like(full), start], -1)[:, None].astype(np.int32)


@pytest.mark.parametrize(("length", "heads", "groups"), [(1, 1, 1), (7, 4, 2), (13, 3, 3), (16, 6, 1)])
def test_equals_reference(length, heads, groups):
    rng = np.random.default_rng(length)
    q = rng.standard_normal((2, length, heads, 8))
    k, v = rng.standard_normal((2, 2, length, groups, 8))
    intervals = random_intervals(rng, 2, length)
    tensors = [paddle.to_tensor(x) for x in (q, k, v)]
    out = flashmask_attention(*tensors, IntervalMask(paddle.to_tensor(intervals), length))
    np.testing.assert_allclose(out.numpy(), reference(q, k, v, intervals, 0), atol=1e-12)


@pytest.mark.parametrize(("causal", "values"), [(True, 1), (True, 2), (False, 2), (False, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_form_of_intervals_means_the_same(causal, values, dtype):
    """The shorter forms equal the four-value one written out; float32 takes the kernel where it is compiled."""
    rng = np.random.default_rng(values)
    length = 11
    q, k, v = (rng.standard_normal((2, length, heads, 8)) for heads in (4, 2, 2))
    columns = np.arange(length)
    start = rng.integers(columns + 1, length + 1, (2, 1, length))  # every row sees itself
    full, none = np.full_like(start, length), np.zeros_like(start)
    end = rng.integers(start, length + 1) if values == 2 and causal else full
    above = np.broadcast_to(columns, start.shape) if causal else rng.integers(0, columns + 1, start.shape)
    short = {(True, 1): [start], (True, 2): [start, end], (False, 2): [start, above]}
    written = [start, end, none, above]
    given = np.stack(short.get((causal, values), written), -1).astype(np.int32)
    tensors = [paddle.to_tensor(x, dtype=dtype) for x in (q, k, v)]
    out = flashmask_attention(*tensors, paddle.to_tensor(given), causal=causal)
    expected = reference(q, k, v, np.stack(written, -1).astype(np.int32), 0)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_that_sees_nothing_gives_zero(dtype):
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((1, 4, 2, 8)), dtype=dtype)
    hidden = paddle.to_tensor(np.array([[4, 4, 0, 2]] * 4, np.int32).reshape(1, 1, 4, 4))
    out = flashmask_attention(x, x, x, hidden).numpy()
    assert (out[:, :2] == 0).all() and (out[:, 2:] != 0).any()


def test_values_that_do_not_fit_are_refused():
    x = paddle.zeros([1, 3, 1, 8])
    with pytest.raises(ValueError, match="intervals of 4 values a column with causal=True; expected 1 or 2"):
        flashmask_attention(x, x, x, paddle.zeros([1, 1, 3, 4], dtype="int32"), causal=True)


def test_later_rows_against_all_keys():
    """Decoding: the last rows alone, with every key, give the same as those rows of the whole."""
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 1, 12, 2, 8))
    intervals = random_intervals(rng, 1, 12)
    q, k, v, columns = (paddle.to_tensor(x) for x in (q, k, v, intervals))
    whole = flashmask_attention(q, k, v, IntervalMask(columns, 12))
    tail = flashmask_attention(q[:, 9:], k, v, IntervalMask(columns, 3, query_start=9))
    np.testing.assert_allclose(tail.numpy(), whole[:, 9:].numpy(), atol=1e-12)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_equal_finite_differences(name):
    rng = np.random.default_rng(4)
    arrays = {n: rng.standard_normal((1, 5, heads, 4)) for n, heads in (("q", 4), ("k", 2), ("v", 2))}
    intervals = random_intervals(rng, 1, 5)
    upstream = rng.standard_normal((1, 5, 4, 4))

    def value(values):
        return (reference(values["q"], values["k"], values["v"], intervals, 0) * upstream).sum()

    tensors = {n: paddle.to_tensor(x, stop_gradient=False) for n, x in arrays.items()}
    mask = IntervalMask(paddle.to_tensor(intervals), 5)
    flashmask_attention(tensors["q"], tensors["k"], tensors["v"], mask).backward(paddle.to_tensor(upstream))
    for index in rng.permutation(arrays[name].size)[:12]:
        step = np.zeros(arrays[name].size)
        step[index] = 1e-6
        step = step.reshape(arrays[name].shape)
        slope = (value({**arrays, name: arrays[name] + step}) - value({**arrays, name: arrays[name] - step})) / 2e-6
        assert tensors[name].grad.numpy().ravel()[index] == pytest.approx(slope, abs=1e-7)
