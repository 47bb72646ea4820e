"""Compiles ``custom_ops/`` into one shared library, once for each state of the sources, of Paddle and of the processor.

The library lies in a folder named by a hash of all three. Several processes may ask at once: one compiles behind a
lock, the others wait and load what it made. Where Paddle is a CUDA build and the machine has a GPU, nvcc compiles the
CUDA kernels into the same library, and the folder's name says for which GPUs. Nothing here imports Paddle.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ernie5.ops import nvcc

SOURCES = Path(__file__).resolve().parents[2] / "custom_ops"
LIBRARY = "ernie5_kernels.so"
INSTALLED = "ernie5_kernels"  # the package that custom_ops/setup.py installs
KEY_FILE = "key.txt"
CACHE_VARIABLE = "ERNIE5_KERNEL_CACHE"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi")
# Glue only: Paddle's headers take long enough. Without its Python bindings they ask neither for Python's headers nor,
# in a build with CUDA, for those of cuBLAS and cuDNN.
BINDING_FLAGS = ("-DPADDLE_WITH_CUSTOM_KERNEL", "-DPADDLE_NO_PYTHON", "-O1", "-w")
BINDING = "binding.cc"
WAIT_NOTE_SECONDS = 2.0


class BuildError(RuntimeError):
    """Why there is no library, in one line."""


def compiler() -> str | None:
    """Path of the C++ compiler (``CXX`` if set, else g++), or None."""
    return shutil.which(os.environ.get("CXX") or "g++")


def paddle_folder() -> Path:
    """Where the paddle package lies, without importing it."""
    spec = importlib.util.find_spec("paddle")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("paddle is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def paddle_cuda() -> str:
    """The CUDA version that Paddle was built for, such as "12.6"; "" for a build without CUDA."""
    text = (paddle_folder() / "version" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda_version\s*=\s*'(\d+(\.\d+)*)'", text, flags=re.MULTILINE)
    return found[1] if found else ""


def cuda_targets() -> tuple[tuple[str, ...], str]:
    """The GPU architectures that want CUDA kernels here, and why they cannot be compiled for them ("": they can)."""
    version = paddle_cuda()
    found = nvcc.capabilities() if version else ()
    wanted = tuple(name for name in found if nvcc.supported(name))
    if found and not wanted:
        return (), f"they need compute capability 8.0 or more, found sm_{found[-1]}"
    return wanted, nvcc.problem(version) if wanted else ""


def source_key(architectures: tuple[str, ...] = (), sources: Path = SOURCES) -> str:
    """Hash of what the library must fit: sources, flags, Paddle, Python and processor; then the GPUs it is for."""
    digest = hashlib.sha256()
    suffixes = (".cc", ".h", ".cu") if architectures else (".cc", ".h")
    for path in sorted(p for p in sources.rglob("*") if p.suffix in suffixes):
        digest.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    facts = (*FLAGS, *BINDING_FLAGS, _paddle_version(), sys.version, _processor())
    digest.update("\n".join((*facts, *nvcc.FLAGS) if architectures else facts).encode())
    return digest.hexdigest()[:16] + "".join(f"-sm{name}" for name in architectures)


def architectures_of(library: Path) -> tuple[str, ...]:
    """The GPUs that a library has CUDA kernels for, from the key beside it."""
    return tuple(re.findall(r"-sm(\w+)", (library.parent / KEY_FILE).read_text(encoding="utf-8")))


def _paddle_version() -> str:
    for name in ("paddlepaddle", "paddlepaddle-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    return "unknown"


def _processor() -> str:
    """Model and instruction sets: ``-march=native`` code of one processor may not run on another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("model name", "flags")
        return "\n".join(next((line for line in lines if line.startswith(name)), "") for name in wanted)
    return "unknown"


def installed_library(key: str) -> Path | None:
    """The library of ``custom_ops/setup.py install``, if it was made from these very sources on such a machine."""
    spec = importlib.util.find_spec(INSTALLED)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        library, found = Path(folder) / LIBRARY, Path(folder) / KEY_FILE
        if library.is_file() and found.is_file() and found.read_text(encoding="utf-8").strip() == key:
            return library
    return None


def cache_folders() -> Iterator[Path]:
    """Where a library may be kept, best first: the variable's folder alone, or the tree's, the user's, a temporary."""
    if os.environ.get(CACHE_VARIABLE):
        yield Path(os.environ[CACHE_VARIABLE])
        return
    yield SOURCES / "build"
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ernie5" / "kernels"
    yield Path(tempfile.gettempdir()) / f"ernie5-kernels-{os.getuid()}"


def find_or_build(quiet: bool = False) -> Path:
    """The library of the present sources: installed, cached, or compiled now. Raises BuildError with one line.

    One with CUDA kernels that lies ready is taken without asking for nvcc; without nvcc the CPU's alone are compiled.
    """
    wanted, problem = cuda_targets()
    possible = () if problem else wanted
    for architectures in dict.fromkeys((wanted, possible)):
        library = _ready(source_key(architectures))
        if library is not None:
            return library
    return _build(possible, quiet)


def _ready(key: str) -> Path | None:
    candidates = (installed_library(key), *(folder / key / LIBRARY for folder in cache_folders()))
    return next((library for library in candidates if library is not None and library.is_file()), None)


def _build(architectures: tuple[str, ...], quiet: bool) -> Path:
    if compiler() is None:
        raise BuildError(f"no C++ compiler ({os.environ.get('CXX') or 'g++'} not found; Debian: apt-get install g++)")
    key, folders, problem = source_key(architectures), list(cache_folders()), ""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid() and folder != folders[0]:
                raise OSError("belongs to another user")
            with _locked(folder / f"{key}.lock", quiet):
                target = folder / key
                if not (target / LIBRARY).is_file():
                    _build_into(target, architectures, quiet)
            return target / LIBRARY
        except OSError as error:
            problem = f"{folder}: {error}"
    raise BuildError(f"no folder to build in ({problem}; set {CACHE_VARIABLE}=DIR)")


@contextlib.contextmanager
def _locked(path: Path, quiet: bool) -> Iterator[None]:
    """An exclusive lock that ends with its holder; says so when another process keeps it for long."""
    with path.open("w", encoding="utf-8") as file:
        started, told = time.monotonic(), quiet
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told and time.monotonic() - started > WAIT_NOTE_SECONDS:
                    print("ernie5: another process is compiling the kernels, waiting", file=sys.stderr)
                    told = True
                time.sleep(0.1)
        yield


def _build_into(target: Path, architectures: tuple[str, ...], quiet: bool) -> None:
    """Compiles beside ``target`` and renames, so that a folder of this name is always whole.

    Objects are kept in ``objects/``: after a change to one source, the others are not compiled again.
    """
    started = time.monotonic()
    if not quiet:
        print("ernie5: compiling the kernels, once for these sources (under a minute on two cores)", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        objects = target.parent / "objects"
        objects.mkdir(exist_ok=True)
        compile_library(made / LIBRARY, objects, architectures)
        (made / KEY_FILE).write_text(target.name + "\n", encoding="utf-8")
        made.rename(target)
    if not quiet:
        print(f"ernie5: kernels ready after {time.monotonic() - started:.0f} s", file=sys.stderr)


def compile_library(
    output: Path,
    objects: Path,
    architectures: tuple[str, ...] = (),
    sources: Path = SOURCES,
    flags: tuple[str, ...] = FLAGS,
) -> None:
    """Every ``custom_ops/**/*.cc`` into the shared library ``output``, a compiler a core; ``objects``: a folder.

    With ``architectures`` every ``.cu`` as well, and the bindings know CUDA.
    """
    units = sorted(sources.glob("*/*.cc"))
    jobs = [(sources / BINDING, (*flags, *binding_flags(bool(architectures)))), *((unit, flags) for unit in units)]
    libraries = (str(paddle_folder() / "base" / "libpaddle.so"),)
    if architectures:
        jobs += [(unit, cuda_flags(architectures)) for unit in sorted(sources.glob("*/*.cu"))]
        libraries += (*_package_flags(), *nvcc.link_flags())
    link_objects(output, compile_objects(jobs, objects, sources), libraries)


def compile_plain(output: Path, objects: Path, extra: tuple[str, ...] = (), sources: Path = SOURCES) -> None:
    """The kernels alone, with their C launchers and without Paddle; ``extra`` flags may ask for a sanitizer."""
    flags = tuple(flag for flag in FLAGS if flag != "-fvisibility=hidden") + extra
    jobs = [(unit, flags) for unit in sorted(sources.glob("*/*.cc"))]
    link_objects(output, compile_objects(jobs, objects, sources), extra)


def compile_objects(jobs: list[tuple[Path, tuple[str, ...]]], objects: Path, sources: Path) -> list[Path]:
    """The object of every (source, flags), in the folder ``objects`` under a name that says what it was made from."""
    headers = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources.rglob("*.h")))).digest()

    def compile_one(job: tuple[Path, tuple[str, ...]]) -> Path:
        unit, flags = job
        program = nvcc.compiler() if unit.suffix == ".cu" else compiler()
        facts = "\n".join((*flags, _paddle_version(), program or "", _processor())).encode()
        key = hashlib.sha256(headers + unit.read_bytes() + facts).hexdigest()[:16]
        output = objects / f"{'_'.join(unit.relative_to(sources).with_suffix('').parts)}-{key}.o"
        if not output.exists():
            part = output.with_suffix(f".{os.getpid()}.part")
            _run([program, *flags, f"-I{sources}", "-c", str(unit), "-o", str(part)])
            part.rename(output)
        return output

    with ThreadPoolExecutor(max_workers=min(len(os.sched_getaffinity(0)), 8)) as pool:
        return list(pool.map(compile_one, jobs))


def link_objects(output: Path, objects: list[Path], extra: tuple[str, ...]) -> None:
    _run([compiler(), "-shared", *map(str, objects), *extra, "-ldl", "-lpthread", "-o", str(output)])


def binding_flags(cuda: bool = False) -> tuple[str, ...]:
    include = paddle_folder() / "include"
    folders = [include, include / "third_party", *(nvcc.include_folders() if cuda else [])]
    return (*BINDING_FLAGS, *(("-DPADDLE_WITH_CUDA",) if cuda else ()), *(f"-I{folder}" for folder in folders))


def _package_flags() -> tuple[str, ...]:
    """Has the library find the runtime and cuBLAS in the packages that Paddle's wheel brings, before the toolkit's."""
    packages = paddle_folder().parent / "nvidia"
    folders = (packages / name / "lib" for name in ("cuda_runtime", "cublas", "cu13"))
    return tuple(f"-Wl,-rpath,{folder}" for folder in folders if folder.is_dir())


def cuda_flags(architectures: tuple[str, ...]) -> tuple[str, ...]:
    host = ("-ccbin", compiler() or "") if os.environ.get("CXX") else ()
    return (*nvcc.FLAGS, "-Xcompiler", "-fvisibility=hidden", *host, *nvcc.target_flags(architectures))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise BuildError(f"{Path(command[0]).name} failed: {reason.strip()}")


def cuda_note(problem: str) -> str:
    """One line for the user, of the problem that ``cuda_targets`` tells."""
    return f"ernie5: no CUDA kernels ({problem}); on a GPU the ops run their slower references"


if __name__ == "__main__":  # tools/setup.sh: a machine without a compiler is told, and goes on with the references
    try:
        made = find_or_build()
        reason = cuda_targets()[1]
        if reason and not architectures_of(made):
            print(cuda_note(reason), file=sys.stderr)
    except (BuildError, ValueError) as problem:
        print(f"ernie5: the kernels are not compiled ({problem}); every op runs its slower reference", file=sys.stderr)
