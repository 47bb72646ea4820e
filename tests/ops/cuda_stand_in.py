"""A kernel library whose bindings believe that every tensor lies on a GPU, to test their CUDA branches without one.

The bindings are compiled with CUDA. Beside them stand our own answers to where a tensor lies, and in place of every
CUDA launcher a function that hands its arguments to the CPU's, notes its name in the file that ``CALLED`` names, and
wants the stream it was promised. So wrong, swapped or missing arguments, types and streams show in the results.
"""

from __future__ import annotations

import re
from pathlib import Path

from ernie5.ops import build
from tests.ops import cuda_harness, harness

CALLED = "ERNIE5_TEST_CALLED"
OPS = ("cross_entropy", "moe_ffn", "patch_embed", "rms_norm", "route", "uni_rope")  # whose bindings call CUDA kernels

PROLOGUE = """
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "common/binding.h"
static const gpuStream_t kStream = reinterpret_cast<gpuStream_t>(0x515);
bool paddle::Tensor::is_gpu() const { return true; }
bool paddle::Tensor::is_cpu() const { return false; }
gpuStream_t paddle::Tensor::stream() const { return kStream; }
extern "C" const char* ernie5_cuda_error_text(int) { return "the stand-in was given another stream"; }
template <class T> struct Any { T value; template <class U> operator U() const { return (U)value; } };
template <class T> Any<T> any(T value) { return {value}; }
static int called(const char* name, void* stream) {
  std::FILE* file = std::fopen(std::getenv("ERNIE5_TEST_CALLED"), "a");
  std::fprintf(file, "%s\\n", name);
  std::fclose(file);
  return stream == kStream ? 0 : 1;
}
extern "C" int ernie5_moe_ffn_host_offsets_cuda(const int32_t* offsets, int64_t experts, int32_t* host, void* stream) {
  std::memcpy(host, offsets, (experts + 1) * sizeof(int32_t));
  return called("ernie5_moe_ffn_host_offsets_cuda", stream);
}
extern "C" int64_t ernie5_rms_norm_backward_cuda_workspace_bytes(int64_t rows, int64_t columns) {
  return ernie5_rms_norm_partial_size(rows, columns) * sizeof(float);
}
"""


def declarations() -> dict[str, list[str]]:
    """Every function of the CUDA headers and its parameters, such as "const float* x"."""
    found = {}
    for header in sorted(build.SOURCES.glob("*/*_cuda.h")):
        text = re.sub(r"//.*", "", header.read_text(encoding="utf-8")).replace("\\\n", " ")
        macros = dict(re.findall(r"#define (ERNIE5_\w+)(.*)", text))
        text = re.sub(r"#.*", "", text)
        for name, value in macros.items():
            text = text.replace(name, value)
        for name, parameters in re.findall(r"\b(ernie5_\w+)\(([^)]*)\)", text):
            found[name] = [" ".join(parameter.split()) for parameter in parameters.split(",")]
    return found


def launchers() -> dict[str, tuple[str, int]]:
    """CUDA launcher -> the CPU's, and how many arguments that one takes."""
    found = {}
    for op in OPS:
        for name, types in harness.module(op).SIGNATURES.items():
            if "_cpu" in name:
                found[cuda_harness.launcher_types(name, types)[0]] = name, len(types)
    return found


def source() -> str:
    declared, text = declarations(), [PROLOGUE]
    includes = [f'#include "{op}/{op}{end}.h"' for op in OPS for end in ("", "_cuda")]
    for cuda, (cpu, count) in launchers().items():
        parameters = declared[cuda]
        names = [re.search(r"\w+$", parameter)[0] for parameter in parameters]
        passed = ", ".join(f"any({name})" for name in names[:count])
        text.append(f'extern "C" int {cuda}({", ".join(parameters)}) {{')
        text.append(f'  {cpu}({passed});\n  return called("{cuda}", stream);\n}}')
    for name, parameters in declared.items():
        if "workspace_bytes" in name and f"int64_t {name}(" not in PROLOGUE:
            text.append(f'extern "C" int64_t {name}({", ".join(parameters)}) {{ return 256; }}')
    return "\n".join([*includes, *text])


def install(folder: Path, kept: Path) -> None:
    """Makes the library and puts it into ``folder`` as ``custom_ops/setup.py`` would; ``kept``: objects to reuse."""
    unit = folder / "stand_in.cc"
    unit.write_text(source(), encoding="utf-8")
    flags = (*build.FLAGS, *build.binding_flags(cuda=True))
    units = sorted(build.SOURCES.glob("*/*.cc"))
    jobs = [(build.SOURCES / build.BINDING, flags), *((plain, build.FLAGS) for plain in units)]
    objects = build.compile_objects(jobs, kept, build.SOURCES)
    objects += build.compile_objects([(unit, (*flags, f"-I{build.SOURCES}"))], folder, folder)
    package = folder / build.INSTALLED
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / build.KEY_FILE).write_text(build.source_key(), encoding="utf-8")
    paddle = str(build.paddle_folder() / "base" / "libpaddle.so")
    build.link_objects(package / build.LIBRARY, objects, ("-Wl,-Bsymbolic", paddle))
