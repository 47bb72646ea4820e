"""The CUDA kernels and the bindings that call them compile and link, wherever there is an nvcc. A stand-in for the GPU
runs the bindings here; cuda_harness.py runs the kernels on a machine that has one.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from custom_ops import cuda_build
from ernie5.ops import build, nvcc
from tests.ops import cuda_harness, cuda_stand_in, harness
from tests.ops.cuda_device import CudaError, require_driver

ROOT = Path(__file__).resolve().parents[2]
NO_NVCC = pytest.mark.skipif(nvcc.compiler() is None, reason="no nvcc on this machine (CUDA toolkit, or set NVCC)")


def _has_driver() -> bool:
    try:
        require_driver()
    except CudaError:
        return False
    return True


@pytest.fixture(scope="module", params=["80", "90a"])
def objects(request, tmp_path_factory):
    return cuda_build.compile_objects(tmp_path_factory.mktemp("cuda"), request.param)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with the objects of the CPU kernels, so that they are not compiled again."""
    folder, made = tmp_path_factory.mktemp("objects"), build.find_or_build().parent.parent / "objects"
    return Path(shutil.copytree(made, folder, dirs_exist_ok=True)) if made.is_dir() else folder


@NO_NVCC
@pytest.mark.slow
def test_every_kernel_compiles_without_a_warning(objects):
    assert len(objects) >= 8
    assert [compiled.messages for compiled in objects if compiled.messages] == []


@NO_NVCC
@pytest.mark.slow
def test_the_headers_declare_what_is_compiled(objects):
    declared, compiled = set(), set()
    for header in cuda_build.SOURCES.glob("*/*_cuda.h"):
        declared |= set(re.findall(r"\b(ernie5_\w+)\(", header.read_text(encoding="utf-8")))
    for made in objects:
        listed = subprocess.run(["nm", "--defined-only", made.object], capture_output=True, text=True, check=True)
        compiled |= set(re.findall(r" T (ernie5_\w+)$", listed.stdout, re.MULTILINE))
    common = {"ernie5_cuda_error_text", "ernie5_cuda_use_grouped_gemm"}  # of common/cuda_blas.h
    assert compiled == declared | common


def _ctype(parameter: str) -> type:
    if "*" in parameter:
        return ctypes.c_void_p
    return {"float": ctypes.c_float, "int": ctypes.c_int, "int64_t": ctypes.c_int64, "void": None}[parameter.split()[0]]


@pytest.mark.parametrize("op", cuda_harness.ops())
def test_a_cuda_launcher_takes_what_the_cpu_one_takes(op):
    declared, launchers = cuda_stand_in.declarations(), 0
    for name, types in harness.module(op).SIGNATURES.items():
        if "_cpu" in name:
            cuda, expected = cuda_harness.launcher_types(name, types)
            assert [_ctype(parameter) for parameter in declared[cuda]] == expected, cuda
            launchers += 1
    assert launchers


@NO_NVCC
@pytest.mark.slow
def test_the_objects_link_into_one_library(objects, tmp_path):
    library = cuda_build.link(objects, tmp_path / cuda_build.LIBRARY)
    ctypes.CDLL(str(library))


def _symbols(library: Path, which: str) -> set[str]:
    command = ["nm", "-D", f"--{which}-only", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listed.splitlines() if " w " not in line}


@NO_NVCC
@pytest.mark.slow
def test_the_library_with_cuda_lacks_nothing_but_what_a_paddle_with_cuda_has(kept, tmp_path):
    library = tmp_path / build.LIBRARY
    build.compile_library(library, kept, ("80", "90a"))
    folder = build.paddle_folder()
    files = folder / "base" / "libpaddle.so", *(folder / "libs").glob("*.so")
    provided = set().union(*(_symbols(file, "defined") for file in files))
    missing = {name for name in _symbols(library, "undefined") - provided if "@" not in name}  # @: of glibc and cudart
    assert missing <= (set() if build.paddle_cuda() else {"_ZNK6paddle6Tensor6streamEv"})  # paddle::Tensor::stream()
    listed = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
    assert set(cuda_stand_in.declarations()) <= set(re.findall(r" [tT] (ernie5_\w+)$", listed, re.MULTILINE))


@NO_NVCC
@pytest.mark.slow
def test_the_bindings_give_every_cuda_launcher_what_it_declares(kept, tmp_path):
    """Real bindings and real tensors; a stand-in for the GPU and for the kernels, which end in the CPU's."""
    cuda_stand_in.install(tmp_path, kept)
    called = tmp_path / "called.txt"
    environment = {**os.environ, cuda_stand_in.CALLED: str(called), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_bindings.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    names = set(called.read_text(encoding="utf-8").split())
    assert names == {*cuda_stand_in.launchers(), "ernie5_moe_ffn_host_offsets_cuda"}


@pytest.mark.skipif(_has_driver(), reason="this machine has a GPU driver")
def test_the_harness_says_in_one_line_that_there_is_no_device():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ops" / "cuda_harness.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(r"cuda_harness: no CUDA device .*\n", done.stderr), done.stderr


@pytest.mark.gpu
@NO_NVCC
@pytest.mark.skipif(not _has_driver(), reason="no GPU on this machine")
def test_the_kernels_equal_the_float64_reference():
    command = [sys.executable, str(ROOT / "tests" / "ops" / "cuda_harness.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
