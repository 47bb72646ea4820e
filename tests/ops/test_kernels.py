"""The compiled kernels against float64 NumPy: sizes from zero up, one and two threads, and under AddressSanitizer."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import paddle
import pytest

from ernie5.ops import build
from tests.ops import harness

ROOT = Path(__file__).resolve().parents[2]
NO_COMPILER = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler on this machine")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    assert paddle.base.core is not None  # its libraries carry the thread team and the bfloat16 product
    folder = tmp_path_factory.mktemp("kernels")
    build.compile_plain(folder / "plain.so", folder)
    return ctypes.CDLL(str(folder / "plain.so"))


@NO_COMPILER
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", harness.names())
def test_kernels_equal_the_float64_reference(library, name, threads):
    library.ernie5_set_num_threads(threads)
    assert library.ernie5_num_threads() == threads
    assert harness.check(library, name, seed=threads) > 3


SANITIZED = """
import ctypes, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.ops import harness
ctypes.CDLL({dnnl!r}, mode=ctypes.RTLD_GLOBAL)
library = ctypes.CDLL({library!r})
library.ernie5_set_num_threads(2)
for name in harness.names():
    print(name, harness.check(library, name, seed=3), flush=True)
"""


@NO_COMPILER
@pytest.mark.slow
def test_no_kernel_touches_memory_outside_its_buffers(tmp_path):
    runtime = subprocess.run(
        [build.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("this compiler has no AddressSanitizer runtime")
    flags = ("-fsanitize=address", "-O1", "-fno-omit-frame-pointer")
    build.compile_plain(tmp_path / "asan.so", tmp_path, flags)
    dnnl = build.paddle_folder() / "libs" / "libdnnl.so.3"
    program = SANITIZED.format(root=str(ROOT), dnnl=str(dnnl), library=str(tmp_path / "asan.so"))
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == harness.names()
