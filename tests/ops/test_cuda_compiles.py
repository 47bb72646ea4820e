"""The CUDA kernels compile for Hopper without a warning, wherever there is an nvcc; cuda_harness.py runs them."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest

from custom_ops import cuda_build
from tests.ops import cuda_harness, harness
from tests.ops.cuda_device import CudaError, require_driver

ROOT = Path(__file__).resolve().parents[2]
NO_NVCC = pytest.mark.skipif(
    cuda_build.compiler() is None, reason="no nvcc on this machine (CUDA toolkit, or set NVCC)"
)


def _has_driver() -> bool:
    try:
        require_driver()
    except CudaError:
        return False
    return True


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return cuda_build.compile_objects(tmp_path_factory.mktemp("cuda"))


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


def _declarations() -> dict[str, list]:
    """Every function of the CUDA headers and the ctypes of its parameters."""
    found = {}
    for header in cuda_build.SOURCES.glob("*/*_cuda.h"):
        text = re.sub(r"//.*", "", header.read_text(encoding="utf-8")).replace("\\\n", " ")
        macros = dict(re.findall(r"#define (ERNIE5_\w+)(.*)", text))
        text = re.sub(r"#.*", "", text)
        for name, value in macros.items():
            text = text.replace(name, value)
        for name, parameters in re.findall(r"\b(ernie5_\w+)\(([^)]*)\)", text):
            found[name] = [_ctype(parameter.strip()) for parameter in parameters.split(",")]
    return found


def _ctype(parameter: str) -> type:
    if "*" in parameter:
        return ctypes.c_void_p
    return {"float": ctypes.c_float, "int": ctypes.c_int, "int64_t": ctypes.c_int64, "void": None}[parameter.split()[0]]


@pytest.mark.parametrize("op", cuda_harness.ops())
def test_a_cuda_launcher_takes_what_the_cpu_one_takes(op):
    declared, launchers = _declarations(), 0
    for name, types in harness.module(op).SIGNATURES.items():
        if "_cpu" in name:
            cuda, expected = cuda_harness.launcher_types(name, types)
            assert declared[cuda] == expected, cuda
            launchers += 1
    assert launchers


@NO_NVCC
@pytest.mark.slow
def test_the_objects_link_into_one_library(objects, tmp_path):
    library = cuda_build.link(objects, tmp_path / cuda_build.LIBRARY)
    ctypes.CDLL(str(library))


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
