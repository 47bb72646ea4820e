"""Compiles the CUDA kernels, ``custom_ops/*/*.cu``, with nvcc alone: no Paddle, no GPU, no library but the runtime.

python custom_ops/cuda_build.py OUT_DIR [ARCHITECTURE]
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
sys.path.insert(0, str(SOURCES.parent))

from ernie5.ops import nvcc  # noqa: E402

LIBRARY = "ernie5_cuda_kernels.so"
ARCHITECTURE = "90a"  # Hopper with its own instructions; from 80 (Ampere) on the kernels compile
MOST_JOBS = 2


class CudaBuildError(RuntimeError):
    """Why there is no library, in one line, or what the compiler said."""


@dataclass(frozen=True)
class Compiled:
    source: Path
    object: Path
    messages: str  # warnings; empty where there are none


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*/*.cu"))


def compile_objects(out_dir: Path, arch: str = ARCHITECTURE) -> list[Compiled]:
    """Every .cu file, at most two at a time. Raises CudaBuildError with what nvcc said of the first that fails."""
    program = nvcc.compiler()
    if program is None:
        raise CudaBuildError("no CUDA compiler (nvcc is not on the PATH; set NVCC, or install the CUDA toolkit)")
    flags = (*nvcc.FLAGS, *nvcc.target_flags((arch,)), f"-I{SOURCES}")

    def compile_one(source: Path) -> Compiled:
        output = out_dir / f"{source.stem}.o"
        command = [program, *flags, "-c", str(source), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        messages = (done.stdout + done.stderr).strip()
        if done.returncode:
            raise CudaBuildError(f"{source.relative_to(SOURCES)} does not compile:\n{messages}")
        return Compiled(source, output, messages)

    out_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(min(MOST_JOBS, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(compile_one, sources()))


def link(objects: list[Compiled], library: Path) -> Path:
    """One shared library of ``objects``; the toolkit's runtime is found by the folder written into it."""
    folders = [f"-Xlinker=-rpath,{folder}" for folder in nvcc.runtime_folders()]
    # The shared runtime, so that a process that has one already does not get a second.
    command = [nvcc.compiler(), "-shared", "-cudart", "shared", *(str(o.object) for o in objects), *folders, "-ldl"]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CudaBuildError(f"linking the CUDA kernels failed:\n{(done.stdout + done.stderr).strip()}")
    return library


def compile_cuda(out_dir: Path, arch: str = ARCHITECTURE) -> Path:
    """One shared library of all kernels and their C launchers, in ``out_dir``; warnings go to stderr."""
    objects = compile_objects(out_dir, arch)
    for compiled in objects:
        if compiled.messages:
            print(compiled.messages, file=sys.stderr)
    return link(objects, out_dir / LIBRARY)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        print(compile_cuda(Path(sys.argv[1]), *sys.argv[2:]))
    except CudaBuildError as error:
        sys.exit(f"cuda_build: {error}")
