"""Multi-scale bitwise quantisation in numpy, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest

from ernie5.tokenizers.scales import ScalePyramid, area_matrix, linear_matrix


def reference_decompose(latent: np.ndarray, scales: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """The residual algorithm, one position and one scale at a time, float64; latent [side, side, d]."""
    side, d = scales[-1], latent.shape[-1]
    total, all_bits = np.zeros_like(latent, dtype=np.float64), []
    for grid in scales:
        residual = latent.astype(np.float64) - total
        code, bits = np.zeros([grid, grid, d]), np.zeros([grid, grid, d], int)
        for i, j in np.ndindex(grid, grid):
            r, area = np.zeros(d), 0.0
            for y, x in np.ndindex(side, side):
                height = min((i + 1) * side / grid, y + 1) - max(i * side / grid, y)
                width = min((j + 1) * side / grid, x + 1) - max(j * side / grid, x)
                share = max(height, 0) * max(width, 0)
                r, area = r + share * residual[y, x], area + share
            u = r / area / np.linalg.norm(r / area)
            bits[i, j] = u > 0
            code[i, j] = np.where(u > 0, 1, -1) / np.sqrt(d)
        for y, x in np.ndindex(side, side):
            total[y, x] += bilinear(code, (y + 0.5) * grid / side - 0.5, (x + 0.5) * grid / side - 0.5)
        all_bits.append(bits.reshape(-1, d))
    return all_bits, total.reshape(-1, d)


def bilinear(grid: np.ndarray, y: float, x: float) -> np.ndarray:
    size = len(grid)
    y, x = min(max(y, 0), size - 1), min(max(x, 0), size - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, size - 1), min(x0 + 1, size - 1)
    top = grid[y0, x0] * (1 - (x - x0)) + grid[y0, x1] * (x - x0)
    bottom = grid[y1, x0] * (1 - (x - x0)) + grid[y1, x1] * (x - x0)
    return top * (1 - (y - y0)) + bottom * (y - y0)


@pytest.mark.parametrize("scales", [[1, 2, 3, 4], [1, 3], [2, 5], [4]])
def test_decompose_equals_loops(scales):
    latent = np.random.default_rng(0).normal(size=(scales[-1], scales[-1], 6)).astype(np.float32)
    codes = ScalePyramid(scales).decompose(latent.reshape(-1, 6))
    bits, total = reference_decompose(latent, scales)
    for found, wanted in zip(codes.bits, bits, strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(codes.total, total, atol=1e-5)


@pytest.mark.parametrize(("size_in", "size_out"), [(4, 1), (4, 2), (4, 3), (7, 3), (5, 5)])
def test_area_rows_average_and_keep_mass(size_in, size_out):
    matrix = area_matrix(size_in, size_out)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    np.testing.assert_allclose(matrix.sum(axis=0), size_out / size_in)


def test_linear_keeps_ramps_inside():
    ramp = linear_matrix(4, 8) @ np.arange(4.0)
    np.testing.assert_allclose(ramp[1:-1], (np.arange(8) + 0.5)[1:-1] / 2 - 0.5)
    assert ramp[0] == 0 and ramp[-1] == 3


def test_matrices_of_a_pyramid():
    pyramid = ScalePyramid([1, 2, 4])
    constant = np.full([4, 3], 2.5, np.float32)
    np.testing.assert_allclose(pyramid.down[1] @ (pyramid.up[1] @ constant), constant, rtol=1e-6)
    np.testing.assert_array_equal(pyramid.down[2], np.eye(16))
    np.testing.assert_array_equal(pyramid.up[2], np.eye(16))
    assert pyramid.sizes == [1, 4, 16] and pyramid.tokens == 21 and len(pyramid) == 3


def test_leading_axes_are_independent():
    latent = np.random.default_rng(1).normal(size=(2, 3, 16, 8)).astype(np.float32)
    pyramid = ScalePyramid([1, 2, 3, 4])
    whole, one = pyramid.decompose(latent), pyramid.decompose(latent[1, 2])
    for a, b in zip(whole.bits + whole.inputs, one.bits + one.inputs, strict=True):
        np.testing.assert_allclose(a[1, 2], b, atol=1e-6)


def test_bits_without_flips_accumulate_to_the_total_and_its_inputs():
    latent = np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32)
    pyramid = ScalePyramid([1, 2, 3, 4])
    clean = pyramid.decompose(latent)
    same = pyramid.decompose(latent, flip=lambda k, bits: bits)
    np.testing.assert_array_equal(same.total, clean.total)
    np.testing.assert_allclose(pyramid.accumulate(clean.bits), clean.total, atol=1e-6)
    for k, feature in enumerate(clean.inputs, start=1):
        expected = pyramid.down[k] @ pyramid.accumulate(clean.bits[:k])
        np.testing.assert_allclose(feature, expected, atol=1e-6)
        np.testing.assert_allclose(pyramid.input_for(k, pyramid.accumulate(clean.bits[:k])), expected, atol=1e-6)


def test_flips_feed_on_and_later_labels_correct_them():
    latent = np.random.default_rng(3).normal(size=(16, 8)).astype(np.float32)
    pyramid = ScalePyramid([1, 2, 4])
    clean = pyramid.decompose(latent)
    bent = pyramid.decompose(latent, flip=lambda k, bits: 1 - bits if k == 0 else bits)
    np.testing.assert_array_equal(bent.bits[0], clean.bits[0])
    wrong = pyramid.up[0] @ pyramid.code(1 - clean.bits[0])
    np.testing.assert_array_equal(bent.bits[1], (pyramid.down[1] @ (latent - wrong) > 0).astype(np.uint8))
    assert (bent.bits[1] != clean.bits[1]).any()
    np.testing.assert_allclose(bent.inputs[0], pyramid.down[1] @ wrong, atol=1e-6)


def test_quantise_lies_on_the_sphere():
    bits, code = ScalePyramid.quantise(np.array([[0.3, -2.0, 0.0, 5.0]], np.float32))
    np.testing.assert_array_equal(bits, [[1, 0, 0, 1]])
    np.testing.assert_allclose(code, [[0.5, -0.5, -0.5, 0.5]])


@pytest.mark.parametrize("scales", [[], [0, 2], [2, 2], [4, 1]])
def test_bad_scales(scales):
    with pytest.raises(ValueError, match="scales: found"):
        ScalePyramid(scales)
