"""One CUDA device through ctypes: memory, a stream, events. No framework; the library brings its runtime."""

from __future__ import annotations

import ctypes
import glob
import site
import sys
from collections.abc import Callable
from ctypes import byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3
CUBLAS = ("libcublas.so.13", "libcublas.so.12", "libcublas.so.11", "libcublas.so")


class CudaError(RuntimeError):
    """What the runtime or a launcher reported, in one line."""


def require_driver() -> None:
    """Raises CudaError where no driver is installed; needs no toolkit."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise CudaError("no CUDA device on this machine (no driver: libcuda.so.1 cannot be loaded)") from None


def load_cublas() -> ctypes.CDLL:
    """cuBLAS from the loader's path or from this Python's nvidia packages; the kernels then find it by its name."""
    folders = [*sys.path, *site.getsitepackages(), site.getusersitepackages()]
    packaged = (path for folder in folders for path in glob.glob(f"{folder}/nvidia/*/lib/libcublas.so.*"))
    for name in (*CUBLAS, *packaged):
        try:
            return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    raise CudaError("cuBLAS not found (put the folder of libcublas.so on LD_LIBRARY_PATH)")


class Device:
    """The current device as seen through ``library``, which links to libcudart."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.ernie5_cuda_error_text.restype = c_char_p
        count = c_int(0)
        code = library.cudaGetDeviceCount(byref(count))
        if code != 0 or count.value == 0:
            raise CudaError(f"no CUDA device on this machine ({self.text(code) if code else 'none is visible'})")
        stream = c_void_p()
        self.check(library.cudaStreamCreate(byref(stream)), "cudaStreamCreate")
        self.stream = stream.value

    def text(self, code: int) -> str:
        return self.library.ernie5_cuda_error_text(c_int(code)).decode()

    def check(self, code: int, where: str) -> None:
        if code != 0:
            raise CudaError(f"{where}: {self.text(code)} ({code})")

    def call(self, name: str, *args: object, types: list | None = None) -> None:
        """A launcher or runtime function that returns a code. Integers are 64 bits unless ``types`` says otherwise."""
        function = getattr(self.library, name)
        function.argtypes = types or [c_float if isinstance(arg, float) else c_int64 for arg in args]
        self.check(function(*args), name)

    def size(self, name: str, *args: int) -> int:
        """Bytes that the function ``name`` asks for."""
        function = getattr(self.library, name)
        function.restype = c_int64
        return function(*map(c_int64, args))

    def malloc(self, size: int) -> int:
        pointer = c_void_p()
        self.check(self.library.cudaMalloc(byref(pointer), c_size_t(max(size, 256))), f"cudaMalloc of {size} bytes")
        return pointer.value

    def free(self, pointer: int) -> None:
        self.check(self.library.cudaFree(c_void_p(pointer)), "cudaFree")

    def fill(self, pointer: int, byte: int, size: int) -> None:
        self.check(self.library.cudaMemset(c_void_p(pointer), c_int(byte), c_size_t(size)), "cudaMemset")

    def _copy(self, to: int, source: int, size: int, kind: int) -> None:
        arguments = c_void_p(to), c_void_p(source), c_size_t(size), c_int(kind)
        self.check(self.library.cudaMemcpy(*arguments), "cudaMemcpy")

    def upload(self, pointer: int, data: np.ndarray) -> None:
        self._copy(pointer, data.ctypes.data, data.nbytes, TO_DEVICE)

    def download(self, pointer: int, size: int) -> np.ndarray:
        data = np.empty(size, np.uint8)
        self._copy(data.ctypes.data, pointer, size, TO_HOST)
        return data

    def copy(self, to: int, source: int, size: int) -> None:
        """On the device, on the stream."""
        arguments = c_void_p(to), c_void_p(source), c_size_t(size), c_int(ON_DEVICE), c_void_p(self.stream)
        self.check(self.library.cudaMemcpyAsync(*arguments), "cudaMemcpyAsync")

    def wait(self) -> None:
        self.check(self.library.cudaStreamSynchronize(c_void_p(self.stream)), "the kernels")

    def place(self, data: np.ndarray) -> int:
        """A new device buffer that holds ``data``."""
        pointer = self.malloc(data.nbytes)
        self.upload(pointer, data)
        return pointer

    def seconds(self, work: Callable[[], None], warm: int = 3, repeat: int = 15) -> float:
        """Median time of ``work`` on the stream, by events around each run."""
        start, stop = c_void_p(), c_void_p()
        for event in (start, stop):
            self.check(self.library.cudaEventCreate(byref(event)), "cudaEventCreate")
        for _ in range(warm):
            work()
        times = []
        for _ in range(repeat):
            self.check(self.library.cudaEventRecord(start, c_void_p(self.stream)), "cudaEventRecord")
            work()
            self.check(self.library.cudaEventRecord(stop, c_void_p(self.stream)), "cudaEventRecord")
            self.check(self.library.cudaEventSynchronize(stop), "the kernels")
            elapsed = c_float()
            self.check(self.library.cudaEventElapsedTime(byref(elapsed), start, stop), "cudaEventElapsedTime")
            times.append(elapsed.value / 1e3)
        for event in (start, stop):
            self.check(self.library.cudaEventDestroy(event), "cudaEventDestroy")
        return float(np.median(times))


def with_kernels(library: Path) -> Device:
    """The device, the compiled kernels loaded with cuBLAS beside them."""
    load_cublas()
    return Device(ctypes.CDLL(str(library)))
