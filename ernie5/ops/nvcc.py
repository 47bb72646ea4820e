"""The CUDA compiler: where it is, what it compiles for, and what a library of its objects needs. No Paddle here.

An architecture is a compute capability without its dot, such as "80" (Ampere), "90" or "90a" (Hopper).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

CAPABILITY_VARIABLE = "PADDLE_CUDA_ARCH_LIST"  # Paddle's own, such as "8.0 9.0"
LEAST_ARCHITECTURE = 80  # reductions over a warp and bfloat16 begin there
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-Wall,-Wextra", "--Werror", "cross-execution-space-call")


def compiler() -> str | None:
    """Path of nvcc: ``NVCC`` if set, else that of the PATH, of ``CUDA_HOME`` or of /usr/local/cuda; or None."""
    if os.environ.get("NVCC"):
        return shutil.which(os.environ["NVCC"])
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(str(home / "bin" / "nvcc"))


def release() -> str:
    """Of the toolkit, such as "12.6"; "" if nvcc does not say."""
    said = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else ""


def problem(paddle_cuda: str) -> str:
    """Why nvcc cannot compile for a Paddle of CUDA ``paddle_cuda``, or "".

    Another major version would bring a second CUDA runtime, which the driver need not support.
    """
    major = paddle_cuda.split(".")[0]
    if compiler() is None:
        return f"no nvcc (install the toolkit of CUDA {major}, or set NVCC)"
    if release().split(".")[0] != major:
        found = f"{compiler()} is of CUDA {release() or '?'}, Paddle of CUDA {paddle_cuda}"
        return f"{found}; set NVCC to one of CUDA {major}"
    return ""


@lru_cache(maxsize=1)
def capabilities() -> tuple[str, ...]:
    """Of the GPUs in this machine, or what ``PADDLE_CUDA_ARCH_LIST`` names in their place; none without a GPU.

    Raises ValueError if the variable holds something else than numbers such as 8.0 or 9.0a.
    """
    named = os.environ.get(CAPABILITY_VARIABLE)
    if named:
        words = [word for word in re.split(r"[;,\s]+", named) if word]
        for word in words:
            if not re.fullmatch(r"\d+\.?\d[af]?", word):
                raise ValueError(f"{CAPABILITY_VARIABLE}: found {word!r}, expected capabilities such as '8.0 9.0'")
    else:
        words = _of_the_driver()
    return tuple(sorted({word.replace(".", "") for word in words}))


def _of_the_driver() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^\d+\.\d$", said.stdout, flags=re.MULTILINE)


def supported(architecture: str) -> bool:
    return int(architecture.rstrip("af")) >= LEAST_ARCHITECTURE


def target_flags(architectures: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures)


@lru_cache(maxsize=1)
def toolkit() -> Path | None:
    """Folder of nvcc's own toolkit. nvcc may be a link or a script, so it is asked."""
    command = [compiler(), "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    here = next((line.split("=", 1)[1] for line in said.splitlines() if line.startswith("#$ _HERE_=")), None)
    return Path(here).parent if here else None


def include_folders() -> list[Path]:
    """Where the runtime's and Thrust's headers are; those of CUDA 13 have moved Thrust."""
    return _present("include", "include/cccl", "targets/x86_64-linux/include", "targets/x86_64-linux/include/cccl")


def runtime_folders() -> list[Path]:
    """Where libcudart is."""
    return _present("lib64", "lib", "targets/x86_64-linux/lib")


def _present(*names: str) -> list[Path]:
    home = toolkit()
    return [home / name for name in names if (home / name).is_dir()] if home else []


def link_flags() -> tuple[str, ...]:
    """For the host's linker. The shared runtime, so that a process that has one already does not get a second."""
    folders = runtime_folders()
    return (*(f"-L{folder}" for folder in folders), *(f"-Wl,-rpath,{folder}" for folder in folders), "-lcudart")
