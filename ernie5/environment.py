"""Process-wide settings that must be in place before Paddle is imported.

Two defaults cost a CPU user dearly: MKL takes a slow path on AMD processors, and glibc hands large blocks back to the
kernel at every free. Both, and one flag of Paddle's, are settled here, once, when ``import ernie5`` runs, together with
two silences: nothing asks the network, and imports do not chatter. A value the user has already exported is never
replaced.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from pathlib import Path

BLAS_VARIABLE = "MKL_DEBUG_CPU_TYPE"
OFFLINE_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
PADDLE_VARIABLES = {
    # Strided views make later copies slow on CPU: without them a training step's forward and backward take 15 % less.
    "FLAGS_use_stride_kernel": "0",
}
QUIET_VARIABLES = {"GLOG_minloglevel": "2", "PADDLENLP_LOG_LEVEL": "WARNING"}
QUIET_MESSAGES = ("No ccache found", ".*pkg_resources", "invalid escape sequence")  # said by imports of Paddle's tree

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HUGE_PAGES, _MADV_HUGEPAGE = Path("/sys/kernel/mm/transparent_hugepage/enabled"), 14
_HUGE, _HEAP = 2 << 20, 1920 << 20  # bytes; below the largest trim threshold, else the kernel would get it back
_blas_state = "not looked at"
_threads_exported = False
_threads = "Paddle's choice, one, until ernie5.model is imported"
_allocator_state = "not set: this C library has no mallopt"


def _processor_vendor() -> str:
    """``GenuineIntel``, ``AuthenticAMD``, ... as the kernel tells it; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _choose_blas() -> str:
    """Has MKL use its AVX2 kernels on AMD, where it would take a slow path. Returns what is in force and why.

    On Intel the same setting switches AVX-512 off (measured: a third of the matmul rate lost), so MKL chooses there.
    """
    if BLAS_VARIABLE in os.environ:
        return f"{os.environ[BLAS_VARIABLE] or 'empty'} (from the environment)"
    vendor = _processor_vendor()
    if vendor not in ("AuthenticAMD", "HygonGenuine"):
        return f"left to MKL ({vendor or 'unknown processor'})"
    if "paddle" in sys.modules:
        warnings.warn(
            "paddle was imported before ernie5, too late to choose its BLAS kernels; import ernie5 first for speed",
            stacklevel=4,
        )
        return "not set: paddle was imported first"
    os.environ[BLAS_VARIABLE] = "5"
    return f"5, AVX2 kernels ({vendor})"


def _keep_freed_memory() -> str:
    """Asks glibc to keep large freed blocks instead of returning them to the kernel. Returns what was done.

    Measured on one core with the three settings against none: a gather of 8192 rows of 512 takes 1.4 instead of 8.6 ms,
    attention forward and backward 300 instead of 400 ms, with a seventh of the page faults.
    """
    if os.environ.get("ERNIE5_KEEP_ALLOCATOR") == "0":
        return "left alone (ERNIE5_KEEP_ALLOCATOR=0)"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return _allocator_state
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    if not all(mallopt(name, value) == 1 for name, value in settings):
        return "mallopt refused; large blocks go back to the kernel"
    return "keeps freed blocks (mallopt)" + (", in huge pages" if _ask_for_huge_pages() else "")


def _ask_for_huge_pages() -> bool:
    """Has the kernel back the heap to come with huge pages where it leaves that to programs. Takes no memory by itself.

    Weights that are streamed through cross a page every 4 KB; measured on two cores, decoding eight sequences is 12 %
    faster with huge pages, one sequence and a training step by a few per cent.
    """
    try:
        if "[madvise]" not in _HUGE_PAGES.read_text(encoding="ascii"):
            return False
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    except (OSError, AttributeError):
        return False
    heap = libc.malloc(_HEAP)  # given back at once, and kept by malloc: blocks to come lie in it
    if heap is None:
        return False
    begin, end = (heap + _HUGE - 1) // _HUGE * _HUGE, (heap + _HEAP) // _HUGE * _HUGE
    done = libc.madvise(begin, end - begin, _MADV_HUGEPAGE) == 0
    libc.free(heap)
    return done


def use_cores() -> None:
    """Gives Paddle's CPU kernels every core of this process, unless OMP_NUM_THREADS was exported.

    Paddle starts with one thread and prints a warning at import when the variable says otherwise; set afterwards, it is
    silent. Called by ``import ernie5.model``.
    """
    global _threads
    if _threads_exported:
        return
    from paddle.base import core

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    core.set_num_threads(cores)
    _threads = f"{cores} (every core of this process)"


def prepare() -> None:
    """Sets every default of this module; called by ``import ernie5``, before Paddle loads."""
    global _allocator_state, _blas_state, _threads_exported, _threads
    if "paddle" not in sys.modules:  # its import sets the variable when nobody has
        _threads_exported = "OMP_NUM_THREADS" in os.environ
    if _threads_exported:
        _threads = f"{os.environ['OMP_NUM_THREADS']} (from the environment)"
    _blas_state = _choose_blas()
    for name, value in {**PADDLE_VARIABLES, **OFFLINE_VARIABLES, **QUIET_VARIABLES}.items():
        os.environ.setdefault(name, value)
    for message in QUIET_MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    _allocator_state = _keep_freed_memory()


def describe() -> dict[str, str]:
    """What ``prepare`` left in force, one line a setting, for ``tools/doctor.py``."""
    names = [*PADDLE_VARIABLES, *OFFLINE_VARIABLES, *QUIET_VARIABLES]
    settings = {name: os.environ.get(name, "unset") for name in names}
    return {BLAS_VARIABLE: _blas_state, "allocator": _allocator_state, "threads": _threads, **settings}
