"""Runs the CUDA kernels on this machine's GPU against float64 references, and measures them.

    python tests/ops/cuda_harness.py [--op NAME] [--bench] [--json PATH]

Needs nvcc, a CUDA device, cuBLAS and NumPy; no Paddle. The cases are those of the CPU kernels (tests/ops/harness): a
call of a CPU launcher becomes one of the CUDA launcher on copies of its arrays. Around every array lie bytes that must
not change and that read as NaN; every call runs twice and must give the same bits; every case runs once more with
arrays that begin 8 bytes past an aligned address.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from custom_ops import cuda_build  # noqa: E402
from tests.ops import cuda_bench, harness  # noqa: E402
from tests.ops.cuda_device import CudaError, Device, require_driver, with_kernels  # noqa: E402

ALIGNMENT = 256
SHIFT = 8  # bytes past an aligned address, in the second round
UNTOUCHED = 0xFF  # a NaN in every float type
# Where patches are rounded to bfloat16 before the product, an error of the largest value.
HALF_LIMITS = {"patch_embed": 3e-2}


@dataclass(frozen=True)
class Launcher:
    """How the arguments of a CUDA launcher differ from those of the CPU one."""

    workspace: str | None = None  # the function that gives its size; {} is the type's suffix
    sizes: Callable[[Sequence], Sequence] = lambda args: ()  # its arguments
    on_host: frozenset[int] = frozenset()  # arrays that stay in host memory
    lists: dict[int, str] = field(default_factory=dict)  # arrays of pointers, and what they point to; "" = the suffix
    offsets: int | None = None  # the argument that is wanted in host memory as well
    replaces_last: bool = False  # the workspace takes the place of the CPU's scratch


def _kept(value: object) -> int:
    return int(value is not None)


LAUNCHERS = {
    "ernie5_route_forward": Launcher("ernie5_permute_cuda_workspace_bytes", lambda a: a[3:6]),
    "ernie5_permute_forward": Launcher("ernie5_permute_cuda_workspace_bytes", lambda a: a[1:4]),
    "ernie5_rms_norm_backward": Launcher(
        "ernie5_rms_norm_backward_cuda_workspace_bytes", lambda a: a[5:7], replaces_last=True
    ),
    "ernie5_adamw_forward": Launcher(
        on_host=frozenset({1, 7, 8, 9, 10}), lists={2: "f32", 3: "f32", 4: "f32", 5: "", 6: "bf16"}
    ),
    "ernie5_sum_of_squares_forward": Launcher(
        "ernie5_sum_of_squares_forward_cuda_workspace_bytes",
        lambda a: (a[0], a[1].ctypes.data),
        on_host=frozenset({1}),
        lists={2: ""},
    ),
    "ernie5_moe_ffn_forward": Launcher(
        "ernie5_moe_ffn_forward_cuda_workspace_bytes_{}", lambda a: (*a[6:11], _kept(a[12])), offsets=3
    ),
    "ernie5_moe_ffn_backward": Launcher(
        "ernie5_moe_ffn_backward_cuda_workspace_bytes_{}", lambda a: a[8:13], offsets=3
    ),
    "ernie5_dense_ffn_forward": Launcher(
        "ernie5_dense_ffn_forward_cuda_workspace_bytes_{}", lambda a: (a[3], a[5], _kept(a[7]))
    ),
    "ernie5_dense_ffn_backward": Launcher("ernie5_dense_ffn_backward_cuda_workspace_bytes"),
    "ernie5_patch_embed_forward": Launcher(
        "ernie5_patch_embed_forward_cuda_workspace_bytes_{}", lambda a: a[6:16], on_host=frozenset({3, 4})
    ),
    "ernie5_patch_embed_backward_u8": Launcher(
        "ernie5_patch_embed_backward_cuda_workspace_bytes_{}", lambda a: a[6:16], on_host=frozenset({2, 3})
    ),
    "ernie5_patch_embed_backward_f32": Launcher(
        "ernie5_patch_embed_backward_cuda_workspace_bytes_{}", lambda a: a[8:18], on_host=frozenset({3, 4})
    ),
}


def launcher(name: str) -> tuple[Launcher, str]:
    """The launcher of a CPU function's name, and the suffix that names the call's type."""
    stem, _, suffix = name.partition("_cpu")
    suffix = suffix.lstrip("_")
    if stem == "ernie5_patch_embed_backward":
        stem += "_" + suffix.partition("_")[0]
    return LAUNCHERS.get(stem, Launcher()), suffix.rpartition("_")[2]


def launcher_types(name: str, types: list) -> tuple[str, list]:
    """Name and argument types of the CUDA launcher that stands for a CPU function with these types."""
    how, _ = launcher(name)
    kept = types[:-1] if how.replaces_last else types
    extra = (how.offsets is not None) + (how.workspace is not None) + 1  # the stream
    return name.replace("_cpu", "_cuda"), [*kept, *[c_void_p] * extra]


class Arena:
    """The arrays of one call in one device buffer, each between bytes that must not change."""

    def __init__(self, shift: int) -> None:
        self.shift = shift
        self.arrays: list[tuple[np.ndarray, int]] = []
        self.size = ALIGNMENT
        self._placed: dict[tuple[int, int], int] = {}

    def add(self, array: np.ndarray) -> int:
        """Offset of the array; one that was added before (a call in place) keeps its own."""
        key = (array.ctypes.data, array.nbytes)
        if array.nbytes == 0 or key not in self._placed:
            self._placed[key] = self.size + self.shift
            self.arrays.append((array, self._placed[key]))
            self.size += -(-(self.shift + array.nbytes) // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        return self._placed[key]

    def image(self) -> np.ndarray:
        data = np.full(self.size, UNTOUCHED, np.uint8)
        for array, offset in self.arrays:
            data[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        return data

    def take_back(self, data: np.ndarray, where: str) -> None:
        """Copies the device's bytes into the arrays; what lies between them must be as it was."""
        between = np.ones(self.size, bool)
        for array, offset in self.arrays:
            between[offset : offset + array.nbytes] = False
            if array.nbytes and array.flags.writeable:
                array.reshape(-1).view(np.uint8)[:] = data[offset : offset + array.nbytes]
        assert (data[between] == UNTOUCHED).all(), f"{where} wrote outside its arrays"


def _pointed(pointers: np.ndarray, sizes: np.ndarray, kind: str) -> list[np.ndarray | None]:
    """Views of the host memory that an array of pointers points to."""
    item = {"f32": ctypes.c_float, "bf16": ctypes.c_uint16}[kind]
    empty = np.empty(0, item)
    return [
        None if not pointer else np.ctypeslib.as_array((item * size).from_address(pointer)) if size else empty
        for pointer, size in zip(pointers.tolist(), sizes.tolist(), strict=True)
    ]


def run_on_device(device: Device, name: str, types: list, args: Sequence[object], shift: int) -> None:
    """What the CPU function ``name`` does to ``args``, done by its CUDA launcher."""
    how, kind = launcher(name)
    arena, make = Arena(shift), []  # make: one function of the arena's address an argument
    for index, (arg, type_) in enumerate(zip(args, types, strict=True)):
        if index in how.lists and arg is not None:
            views = _pointed(arg, args[1], how.lists[index] or kind)
            offsets = [None if view is None else arena.add(view) for view in views]
            make.append(lambda base, o=offsets: np.array([0 if x is None else base + x for x in o], np.uint64))
        elif isinstance(arg, np.ndarray) and index not in how.on_host:
            offset = arena.add(arg)
            make.append(lambda base, o=offset: c_void_p(base + o))
        else:
            make.append(lambda _, a=arg, t=type_: a if a is None or isinstance(a, np.ndarray) else t(a))
    space = device.size(how.workspace.format(kind), *how.sizes(args)) if how.workspace is not None else 0
    buffer, workspace = device.malloc(arena.size), device.malloc(space + ALIGNMENT)
    try:
        results = [_launch(device, name, how, arena, make, buffer, (workspace, space)) for _ in range(2)]
    finally:
        device.free(buffer)
        device.free(workspace)
    assert (results[0] == results[1]).all(), f"{name}: two runs differ"
    arena.take_back(results[0], name)


def _launch(
    device: Device, name: str, how: Launcher, arena: Arena, make: list, buffer: int, space: tuple[int, int]
) -> np.ndarray:
    device.upload(buffer, arena.image())
    device.fill(space[0], UNTOUCHED, space[1] + ALIGNMENT)
    values = [function(buffer) for function in make]
    if how.offsets is not None:
        experts = next(a.size for a, offset in arena.arrays if buffer + offset == values[how.offsets].value) - 1
        host = np.full(experts + 1, -7, np.int32)
        pointers = values[how.offsets], c_int64(experts), c_void_p(host.ctypes.data), c_void_p(device.stream)
        device.check(device.library.ernie5_moe_ffn_host_offsets_cuda(*pointers), "host_offsets")
        values.append(host)
    if how.replaces_last:
        values.pop()
    if how.workspace is not None:
        values.append(c_void_p(space[0]))
    # The arrays of host memory are held by `values` until the call returns.
    plain = [c_void_p(value.ctypes.data) if isinstance(value, np.ndarray) else value for value in values]
    function = getattr(device.library, name.replace("_cpu", "_cuda"))
    device.check(function(*plain, c_void_p(device.stream)), name)
    device.wait()
    assert (device.download(space[0] + space[1], ALIGNMENT) == UNTOUCHED).all(), f"{name} wrote past its workspace"
    return device.download(buffer, arena.size)


def check(device: Device, name: str, seed: int = 0) -> int:
    """Every case of an op, aligned and not; returns how many. Raises AssertionError that names the case."""
    op = harness.module(name)
    count = 0
    for shift in (0, SHIFT):

        def call(function: str, *args: object, shift: int = shift) -> int:
            if "_cpu" not in function:
                return 1  # a size of the CPU kernel's scratch
            run_on_device(device, function, op.SIGNATURES[function], args, shift)
            return 0

        for number, case in enumerate(op.cases(np.random.default_rng(seed))):
            got, wanted = op.run(call, case), op.reference(case)
            half = str(case.get("kind", "")).endswith("bf16")
            limit = HALF_LIMITS.get(name, op.TOLERANCE) if half else op.TOLERANCE
            for key, value in wanted.items():
                harness.compare(got[key], value, limit, f"{name} case {number}, {shift} bytes off: {key}")
            count += 1
    return count


def ops() -> list[str]:
    """Those that have both cases and a CUDA kernel."""
    kernels = {source.stem for source in cuda_build.sources()}
    return [name for name in harness.names() if name in kernels]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=ops(), help="only this one")
    parser.add_argument("--bench", action="store_true", help="measure, after the checks")
    parser.add_argument("--json", type=Path, metavar="PATH", help='with --bench: write {"figures": {name: number}}')
    parser.add_argument("--arch", default=cuda_build.ARCHITECTURE, help="compute capability (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.json and not options.bench:
        parser.error("--json writes what --bench measures; add --bench")
    return options


def main() -> None:
    options = parse()
    try:
        require_driver()
        with tempfile.TemporaryDirectory() as folder:
            device = with_kernels(cuda_build.compile_cuda(Path(folder), options.arch))
        chosen = [options.op] if options.op else ops()
        for name in chosen:
            print(f"{name}: {check(device, name)} cases agree with float64", flush=True)
        if options.bench:
            figures = cuda_bench.measure(device, chosen)
            if options.json:
                options.json.write_text(json.dumps({"figures": figures}, indent=1) + "\n", encoding="utf-8")
    except (CudaError, cuda_build.CudaBuildError) as error:
        sys.exit(f"cuda_harness: {error}")
    except AssertionError as error:
        sys.exit(f"cuda_harness: wrong result: {error}")


if __name__ == "__main__":
    main()
