"""Compiling, finding and giving up on the kernel library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernie5.ops import build, nvcc

ROOT = Path(__file__).resolve().parents[2]
PROBE = "import ernie5.ops.build as b; print(b.find_or_build())"


@pytest.fixture
def quick(monkeypatch):
    """Compiling takes half a minute; here it writes a file that says so."""
    made = []

    def compile_library(output: Path, objects: Path, architectures: tuple[str, ...]) -> None:
        made.append(architectures)
        output.write_text("library", encoding="utf-8")

    monkeypatch.setattr(build, "compile_library", compile_library)
    monkeypatch.setattr(build, "installed_library", lambda key: None)
    return made


def test_a_library_is_compiled_once_and_found_again(quick, tmp_path, monkeypatch):
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path))
    first = build.find_or_build(quiet=True)
    assert build.find_or_build(quiet=True) == first and len(quick) == 1
    assert first.read_text(encoding="utf-8") == "library" and first.parent.name == build.source_key()


def test_the_key_follows_the_sources(tmp_path):
    (tmp_path / "op").mkdir()
    source = tmp_path / "op" / "op.cc"
    source.write_text("int a;", encoding="utf-8")
    before = build.source_key(sources=tmp_path)
    source.write_text("int b;", encoding="utf-8")
    assert build.source_key(sources=tmp_path) != before


def test_a_folder_that_cannot_be_written_is_passed_over(quick, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(build, "cache_folders", lambda: iter([tmp_path / "file" / "inside", tmp_path / "good"]))
    assert build.find_or_build(quiet=True).is_relative_to(tmp_path / "good")


def test_no_compiler_is_one_clear_line(tmp_path):
    environment = {**os.environ, "CXX": "no-such-compiler", build.CACHE_VARIABLE: str(tmp_path)}
    code = "import ernie5, paddle; from ernie5.ops.norm import rms_norm\nfor _ in range(2): "
    code += "print(rms_norm(paddle.ones([2, 4]), paddle.ones([4]), 1e-6).shape)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    assert done.stderr.count("every op runs its slower reference") == 1
    assert "no C++ compiler (no-such-compiler not found" in done.stderr
    assert done.stdout.count("2, 4") == 2


def test_an_installed_library_serves_without_a_compiler(tmp_path, monkeypatch):
    package = tmp_path / build.INSTALLED
    package.mkdir()
    for name, text in (("__init__.py", ""), (build.LIBRARY, "library"), (build.KEY_FILE, build.source_key())):
        (package / name).write_text(text, encoding="utf-8")
    environment = {**os.environ, "CXX": "no-such-compiler", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert done.stdout.strip() == str(package / build.LIBRARY)
    (package / build.KEY_FILE).write_text("of other sources", encoding="utf-8")
    environment[build.CACHE_VARIABLE] = str(tmp_path / "cache")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode and "no C++ compiler" in done.stderr


def test_several_processes_compile_once(tmp_path):
    """Real processes and a real, small source; the others wait and load what the first one made."""
    sources = tmp_path / "sources"
    (sources / "op").mkdir(parents=True)
    (sources / "op" / "op.cc").write_text("int answer() { return 42; }", encoding="utf-8")
    (sources / build.BINDING).write_text("int answer(); int again() { return answer(); }", encoding="utf-8")
    if build.compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    code = (
        "import sys, pathlib, ernie5.ops.build as b\n"
        f"b.SOURCES = pathlib.Path({str(sources)!r})\n"
        "b.source_key.__defaults__ = ((), b.SOURCES)\n"
        "b.compile_library.__defaults__ = ((), b.SOURCES, b.FLAGS)\n"
        "b.installed_library = lambda key: None\n"
        "print(b.find_or_build())"
    )
    environment = {**os.environ, build.CACHE_VARIABLE: str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert len({out for out, _ in outputs}) == 1 and Path(outputs[0][0].strip()).is_file()
    assert sum("compiling the kernels" in err for _, err in outputs) == 1


@pytest.fixture
def gpu(quick, tmp_path, monkeypatch):
    """A Paddle of CUDA 12.6 and two GPUs; ``gpu(release)`` puts an nvcc of that release on the machine."""

    def install(release: str) -> None:
        program = tmp_path / "nvcc"
        program.write_text(
            f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n", encoding="utf-8"
        )
        program.chmod(0o755)

    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf '8.6\\n9.0\\n9.0\\n'\n", encoding="utf-8")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NVCC", str(tmp_path / "nvcc"))
    monkeypatch.delenv(nvcc.CAPABILITY_VARIABLE, raising=False)
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(build, "paddle_cuda", lambda: "12.6")
    nvcc.capabilities.cache_clear()
    yield install
    nvcc.capabilities.cache_clear()


def test_with_nvcc_the_cuda_kernels_are_compiled_for_the_gpus_here(gpu, quick):
    gpu("12.6")
    library = build.find_or_build(quiet=True)
    assert quick == [("86", "90")] and build.architectures_of(library) == ("86", "90")
    (library.parents[2] / "nvcc").unlink()
    assert build.find_or_build(quiet=True) == library, "what lies ready needs no nvcc"


@pytest.mark.parametrize(
    ("release", "reason"),
    [(None, "no nvcc (install the toolkit of CUDA 12"), ("13.0", "is of CUDA 13.0, Paddle of CUDA")],
)
def test_without_a_fitting_nvcc_the_cpu_kernels_are_compiled_and_one_line_says_why(gpu, quick, release, reason):
    if release:
        gpu(release)
    library = build.find_or_build(quiet=True)
    assert quick == [()] and build.architectures_of(library) == ()
    problem = build.cuda_targets()[1]
    assert reason in problem and "\n" not in build.cuda_note(problem)


@pytest.mark.parametrize(
    ("named", "wanted", "problem"),
    [("8.0;9.0a", ("80", "90a"), ""), ("7.0 8.9", ("89",), ""), ("7.5", (), "8.0 or more, found sm_75")],
)
def test_the_user_may_name_the_gpus(gpu, monkeypatch, named, wanted, problem):
    gpu("12.8")
    monkeypatch.setenv(nvcc.CAPABILITY_VARIABLE, named)
    targets, found = build.cuda_targets()
    assert targets == wanted and (found.endswith(problem) if problem else not found)


def test_a_gpu_that_is_no_number_is_one_clear_line(gpu, monkeypatch):
    monkeypatch.setenv(nvcc.CAPABILITY_VARIABLE, "Hopper")
    with pytest.raises(ValueError, match=r"found 'Hopper', expected capabilities such as '8\.0 9\.0'"):
        build.find_or_build(quiet=True)


def test_a_paddle_without_cuda_asks_for_none(gpu, quick, monkeypatch):
    monkeypatch.setattr(build, "paddle_cuda", lambda: "")
    gpu("12.6")
    build.find_or_build(quiet=True)
    assert quick == [()] and build.cuda_targets() == ((), "")
