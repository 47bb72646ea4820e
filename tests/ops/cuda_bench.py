"""Achieved rates of the CUDA kernels against two ceilings of the same run: a device copy and a bfloat16 matrix product.

A kernel's bytes are what it must move (every input read once, every output written once), its operations those of its
matrix products; the larger of the two fractions says how close it is. Sizes exceed the second-level cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import byref, c_float, c_int, c_void_p
from dataclasses import dataclass

import numpy as np

from tests.ops.cuda_device import CudaError, Device, load_cublas

COPY_BYTES = 2 << 30
MATMUL_SIDE = 8192
TILE = 1 << 22  # random values that fill a buffer, over and over
BF16, FLOAT = 2, 4


@dataclass
class Measured:
    name: str
    seconds: float
    size: float  # bytes that must move
    work: float = 0.0  # operations of its matrix products


class Memory:
    """Buffers of one benchmark, freed together."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.pointers: list[int] = []
        self.rng = np.random.default_rng(0)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.device.wait()
        for pointer in self.pointers:
            self.device.free(pointer)

    def empty(self, size: int) -> int:
        self.pointers.append(self.device.malloc(size))
        return self.pointers[-1]

    def holds(self, data: np.ndarray) -> int:
        self.pointers.append(self.device.place(np.ascontiguousarray(data)))
        return self.pointers[-1]

    def random(self, count: int, item: int = BF16, scale: float = 1.0) -> int:
        """``count`` normal values: a random tile, repeated."""
        tile = (scale * self.rng.standard_normal(min(count, TILE), dtype=np.float32)).astype(np.float32)
        if item == BF16:
            tile = (tile.view(np.uint32) >> 16).astype(np.uint16)
        pointer, size, filled = self.empty(count * item), count * item, tile.nbytes
        self.device.upload(pointer, tile)
        while filled < size:
            part = min(filled, size - filled)
            self.device.copy(pointer + filled, pointer, part)
            filled += part
        return pointer


def copy_rate(device: Device) -> float:
    """Bytes read and written in a second by a device-to-device copy."""
    with Memory(device) as memory:
        source, to = memory.random(COPY_BYTES // BF16), memory.empty(COPY_BYTES)
        return 2 * COPY_BYTES / device.seconds(lambda: device.copy(to, source, COPY_BYTES))


def matmul_rate(device: Device) -> float:
    """bfloat16 operations in a second of cuBLAS' square product, on random values."""
    blas, handle, side, half, compute, default = load_cublas(), c_void_p(), c_int(MATMUL_SIDE), c_int(14), 68, -1
    if blas.cublasCreate_v2(byref(handle)) or blas.cublasSetStream_v2(handle, c_void_p(device.stream)):
        raise CudaError("cuBLAS gives no handle")
    one, zero, none = c_float(1), c_float(0), c_int(0)
    with Memory(device) as memory:
        a, b, c = (c_void_p(memory.random(MATMUL_SIDE**2)) for _ in range(3))
        operands = byref(one), a, half, side, b, half, side, byref(zero), c, half, side, c_int(compute), c_int(default)

        def multiply() -> None:
            if blas.cublasGemmEx(handle, none, none, side, side, side, *operands):
                raise CudaError("cublasGemmEx failed")

        rate = 2 * MATMUL_SIDE**3 / device.seconds(multiply)
    blas.cublasDestroy_v2(handle)
    return rate


def rms_norm(device: Device) -> Iterator[Measured]:
    rows, columns = 16384, 4096
    size = rows * columns * BF16
    with Memory(device) as memory:
        x, residual, grad = (memory.random(rows * columns) for _ in range(3))
        y, total, weight, grad_weight = (memory.empty(n) for n in (size, size, columns * BF16, columns * BF16))
        inverse, stream = memory.empty(rows * FLOAT), device.stream
        device.upload(weight, np.full(columns, 0x3F80, np.uint16))
        space = memory.empty(device.size("ernie5_rms_norm_backward_cuda_workspace_bytes", rows, columns))

        def forward() -> None:
            args = x, residual, weight, rows, columns, 1e-5, y, total, inverse, stream
            device.call("ernie5_rms_norm_forward_cuda_bf16", *args)

        yield Measured("rms_norm_forward", device.seconds(forward), 4 * size)

        def backward() -> None:
            args = total, weight, inverse, grad, residual, rows, columns, y, 0, grad_weight, space, stream
            device.call("ernie5_rms_norm_backward_cuda_bf16", *args)

        yield Measured("rms_norm_backward", device.seconds(backward), 4 * size)


def cross_entropy(device: Device) -> Iterator[Measured]:
    rows, classes = 8192, 65536
    size = rows * classes * BF16
    with Memory(device) as memory:
        logits, grad = memory.random(rows * classes), memory.empty(size)
        labels = memory.holds(memory.rng.integers(0, classes, rows))
        loss, lse, grad_loss = memory.empty(rows * FLOAT), memory.empty(rows * FLOAT), memory.random(rows, FLOAT)

        def forward() -> None:
            args = logits, labels, rows, classes, loss, lse, device.stream
            device.call("ernie5_cross_entropy_forward_cuda_bf16", *args)

        yield Measured("cross_entropy_forward", device.seconds(forward), size)

        def backward() -> None:
            args = logits, labels, lse, grad_loss, rows, classes, grad, device.stream
            device.call("ernie5_cross_entropy_backward_cuda_bf16", *args)

        yield Measured("cross_entropy_backward", device.seconds(backward), 2 * size)


def uni_rope(device: Device) -> Iterator[Measured]:
    positions, heads, groups, dim = 32768, 32, 8, 128
    with Memory(device) as memory:
        q, k = memory.random(positions * heads * dim), memory.random(positions * groups * dim)
        q_out, k_out = memory.empty(positions * heads * dim * BF16), memory.empty(positions * groups * dim * BF16)
        cos, sin = (memory.random(positions * dim // 2, FLOAT) for _ in range(2))

        def rotate() -> None:
            args = q, k, cos, sin, positions, heads, groups, dim, 1.0, q_out, k_out, device.stream
            device.call("ernie5_uni_rope_cuda_bf16", *args)

        size = positions * dim * (2 * (heads + groups) * BF16 + FLOAT)
        yield Measured("uni_rope", device.seconds(rotate), size)


def route(device: Device) -> Iterator[Measured]:
    tokens, experts, top_k = 65536, 256, 8
    items, sizes = tokens * top_k, (65536, 256, 8)
    with Memory(device) as memory:
        logits, grad_logits = memory.random(tokens * experts, FLOAT), memory.empty(tokens * experts * FLOAT)
        bias, valid = memory.random(experts, FLOAT, 0.01), memory.holds(np.ones(tokens, np.uint8))
        chosen, order, weights = (memory.empty(items * FLOAT) for _ in range(3))
        grad = memory.random(items, FLOAT)
        counts, offsets = memory.empty(experts * 8), memory.empty((experts + 1) * 4)
        space = memory.empty(device.size("ernie5_permute_cuda_workspace_bytes", *sizes))

        def forward() -> None:
            out = chosen, weights, counts, order, offsets, space, device.stream
            device.call("ernie5_route_forward_cuda_f32", logits, bias, valid, *sizes, 0, 1.0, *out)

        yield Measured("route_forward", device.seconds(forward), (tokens * experts + 3 * items) * FLOAT)

        def permute() -> None:
            device.call("ernie5_permute_forward_cuda", chosen, *sizes, counts, order, offsets, space, device.stream)

        yield Measured("permute", device.seconds(permute), 2 * items * FLOAT)

        def backward() -> None:
            args = logits, chosen, grad, *sizes, 0, 1.0, grad_logits, device.stream
            device.call("ernie5_route_backward_cuda_f32", *args)

        yield Measured("route_backward", device.seconds(backward), (tokens * experts + 3 * items) * FLOAT)


def adamw(device: Device) -> Iterator[Measured]:
    tensors, each = 96, 1 << 21
    count = tensors * each
    with Memory(device) as memory:
        state = [memory.random(count, FLOAT, scale) for scale in (1.0, 0.01, 0.01)]
        device.fill(state[2], 0, count * FLOAT)  # second moments are never negative
        grads, copies, total = memory.random(count, BF16, 0.01), memory.empty(count * BF16), memory.empty(8)

        def pointers(base: int, item: int) -> np.ndarray:
            return base + item * each * np.arange(tensors, dtype=np.uint64)

        sizes, powers = np.full(tensors, each, np.int64), np.full(tensors, 0.9, np.float32)
        lists = [*(pointers(base, FLOAT) for base in state), pointers(grads, BF16), pointers(copies, BF16)]
        rates = np.full(tensors, 1e-3, np.float32)
        arrays = [array.ctypes.data for array in (sizes, *lists, rates, rates, powers, powers)]

        def step() -> None:
            device.call("ernie5_adamw_forward_cuda_bf16", tensors, *arrays, 0.9, 0.95, 1e-8, 1.0, device.stream)

        yield Measured("adamw", device.seconds(step), count * (6 * FLOAT + 2 * BF16))
        needed = device.size("ernie5_sum_of_squares_forward_cuda_workspace_bytes", tensors, sizes.ctypes.data)
        space = memory.empty(needed)

        def squares() -> None:
            args = tensors, sizes.ctypes.data, lists[3].ctypes.data, total, space, device.stream
            device.call("ernie5_sum_of_squares_forward_cuda_bf16", *args)

        yield Measured("sum_of_squares", device.seconds(squares), count * BF16)


def moe_ffn(device: Device) -> Iterator[Measured]:
    for experts, top_k, width in ((64, 4, 1024), (256, 8, 512)):
        yield from _moe_ffn(device, 16384, top_k, 2048, experts, width)


def _moe_ffn(device: Device, tokens: int, top_k: int, dim: int, experts: int, width: int) -> Iterator[Measured]:
    sizes, rows = (tokens, top_k, dim, experts, width), tokens * top_k
    with Memory(device) as memory:
        x, grad_y = memory.random(tokens * dim), memory.random(tokens * dim)
        gate_up = memory.random(experts * dim * 2 * width, BF16, dim**-0.5)
        down = memory.random(experts * dim * width, BF16, width**-0.5)
        chosen = memory.rng.integers(0, experts, rows)
        order = np.argsort(chosen, kind="stable").astype(np.int32)
        host = np.concatenate([[0], np.cumsum(np.bincount(chosen, minlength=experts))]).astype(np.int32)
        weights, order, offsets = memory.random(rows, FLOAT), memory.holds(order), memory.holds(host)
        y, grad_x = memory.empty(tokens * dim * BF16), memory.empty(tokens * dim * BF16)
        hidden, scratch, work = (memory.empty(rows * n * BF16) for n in (2 * width, dim, 3 * width))
        grad_weights, matrix = memory.empty(rows * FLOAT), experts * dim * width
        grad_gate_up, grad_down = memory.empty(2 * matrix * BF16), memory.empty(matrix * BF16)
        needed = "ernie5_moe_ffn_{}_cuda_workspace_bytes_bf16".format
        spaces = [
            memory.empty(device.size(needed("forward"), *sizes, 1)),
            memory.empty(device.size(needed("backward"), *sizes)),
        ]
        given, last = (x, weights, order, offsets, gate_up, down), (host.ctypes.data,)

        def forward() -> None:
            args = *given, *sizes, y, hidden, scratch, *last, spaces[0], device.stream
            device.call("ernie5_moe_ffn_forward_cuda_bf16", *args)

        def backward() -> None:
            grads = grad_x, grad_weights, grad_gate_up, grad_down
            args = *given, hidden, grad_y, *sizes, *grads, scratch, work, *last, spaces[1], device.stream
            device.call("ernie5_moe_ffn_backward_cuda_bf16", *args)

        moved = [(n * tokens * dim + m * matrix + rows * 2 * width) * BF16 for n, m in ((2, 3), (3, 6))]
        products = 6.0 * rows * dim * width
        for grouped in (1, 0):
            device.library.ernie5_cuda_use_grouped_gemm(c_int(grouped))
            tail = f"{experts}_experts" + ("" if grouped else "_one_by_one")
            yield Measured(f"moe_ffn_forward_{tail}", device.seconds(forward), moved[0], products)
            yield Measured(f"moe_ffn_backward_{tail}", device.seconds(backward), moved[1], 2 * products)
        device.library.ernie5_cuda_use_grouped_gemm(c_int(1))


def patch_embed(device: Device) -> Iterator[Measured]:
    sizes = {"B": 8, "T": 32, "H": 448, "W": 448, "C": 3, "pt": 2, "ph": 14, "pw": 14, "lead": 0, "D": 1152}
    values = 8 * 32 * 448 * 448 * 3
    depth, tokens = 2 * 14 * 14 * 3, 8 * 16 * 32 * 32
    with Memory(device) as memory:
        video = memory.holds(memory.rng.integers(0, 256, values, dtype=np.uint8))
        weight, bias = memory.random(depth * sizes["D"], BF16, depth**-0.5), memory.random(sizes["D"])
        out, grad = memory.empty(tokens * sizes["D"] * BF16), memory.random(tokens * sizes["D"])
        grad_weight, grad_bias = memory.empty(depth * sizes["D"] * BF16), memory.empty(sizes["D"] * BF16)
        moments = [np.full(3, value, np.float32) for value in (0.5, 0.25)]
        mean, deviation = (array.ctypes.data for array in moments)
        needed = "ernie5_patch_embed_{}_cuda_workspace_bytes_bf16".format
        spaces = [memory.empty(device.size(needed(way), *sizes.values())) for way in ("forward", "backward")]

        def forward() -> None:
            args = video, weight, bias, mean, deviation, out, *sizes.values(), spaces[0], device.stream
            device.call("ernie5_patch_embed_forward_cuda_u8_bf16", *args)

        def backward() -> None:
            args = video, grad, mean, deviation, grad_weight, grad_bias, *sizes.values(), spaces[1], device.stream
            device.call("ernie5_patch_embed_backward_cuda_u8_bf16", *args)

        moved, products = values + tokens * sizes["D"] * BF16, 2.0 * tokens * depth * sizes["D"]
        yield Measured("patch_embed_forward", device.seconds(forward), moved, products)
        yield Measured("patch_embed_backward", device.seconds(backward), moved, products)


BENCHMARKS: dict[str, Callable[[Device], Iterator[Measured]]] = {
    function.__name__: function for function in (adamw, cross_entropy, moe_ffn, patch_embed, rms_norm, route, uni_rope)
}


def measure(device: Device, names: list[str]) -> dict[str, float]:
    """Prints a table and returns its figures."""
    copy, matmul = copy_rate(device), matmul_rate(device)
    print(f"ceilings of this run: copy {copy / 1e12:.2f} TB/s, bf16 matrix product {matmul / 1e12:.0f} TFLOP/s")
    print(f"{'kernel':44}{'ms':>9}{'TB/s':>8}{'of copy':>9}{'TFLOP/s':>9}{'of matmul':>11}")
    figures = {"copy_bytes_per_second": copy, "matmul_flops_per_second": matmul}
    for name in names:
        for one in BENCHMARKS[name](device) if name in BENCHMARKS else ():
            rate, work = one.size / one.seconds, one.work / one.seconds
            matrix = f"{work / 1e12:9.0f}{work / matmul:11.2f}" if work else ""
            line = f"{one.name:44}{one.seconds * 1e3:9.3f}{rate / 1e12:8.2f}{rate / copy:9.2f}{matrix}"
            print(line.rstrip(), flush=True)
            figures[f"{one.name}_milliseconds"] = one.seconds * 1e3
            figures[f"{one.name}_fraction_of_copy"] = rate / copy
            if work:
                figures[f"{one.name}_fraction_of_matmul"] = work / matmul
    return figures


assert ctypes.sizeof(c_void_p) == 8, "pointers travel as 64-bit integers here"
