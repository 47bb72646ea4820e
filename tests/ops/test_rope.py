import numpy as np
import paddle
import pytest

from ernie5.ops.rope import band_frequencies, rope_tables, uni_rope

BASE = 1.0e4


def rotate_pairs(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x [h], angles [h/2]: each (even, odd) pair as a complex number turned by its angle."""
    turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * angles)
    out = np.empty_like(x)
    out[0::2], out[1::2] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("pattern", ["hwt", "t", "hwhwhwhwhwhwtttt"])
@pytest.mark.parametrize("heads", [1, 3])
def test_rotation_equals_complex_reference(pattern, heads):
    rng = np.random.default_rng(0)
    dim = 32
    positions = rng.uniform(0, 40, (2, 5, 3))
    x = rng.standard_normal((2, 5, heads * dim))
    tables = rope_tables(paddle.to_tensor(positions), dim, BASE, pattern)
    tensor = paddle.to_tensor(x, stop_gradient=False)
    key = paddle.to_tensor(x[..., :dim], stop_gradient=False)
    out, turned_key = uni_rope(tensor, key, tables)
    expected = np.empty_like(x)
    for b, s, n in np.ndindex(2, 5, heads):
        angles = [
            positions[b, s, "thw".index(pattern[i % len(pattern)])] * BASE ** (-2 * i / dim) for i in range(dim // 2)
        ]
        head = slice(n * dim, (n + 1) * dim)
        expected[b, s, head] = rotate_pairs(x[b, s, head], np.array(angles))
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(turned_key.numpy(), expected[..., :dim], atol=1e-12)
    upstream = rng.standard_normal(x.shape)
    out.backward(paddle.to_tensor(upstream))
    inverse = rope_tables(paddle.to_tensor(-positions), dim, BASE, pattern)
    back, _ = uni_rope(paddle.to_tensor(upstream), key, inverse)
    np.testing.assert_allclose(tensor.grad.numpy(), back.numpy(), atol=1e-12, err_msg="gradient is the inverse turn")


def test_equal_coordinates_give_one_dimensional_rope():
    index = np.arange(7, dtype=np.float64)[None, :, None].repeat(3, axis=2)
    x = paddle.to_tensor(np.random.default_rng(1).standard_normal((1, 7, 16)))
    tables = [rope_tables(paddle.to_tensor(index), 16, BASE, pattern) for pattern in ("hwt", "t")]
    np.testing.assert_allclose(uni_rope(x, x, tables[0])[0].numpy(), uni_rope(x, x, tables[1])[1].numpy(), atol=1e-12)


def test_every_band_turns_with_one_axis():
    assert ((band_frequencies(64, 1e6, "hwt") != 0).sum(axis=0) == 1).all()
