"""Compiles ``custom_ops/`` into one shared library, once for each state of the sources, of Paddle and of the processor.

The library lies in a folder named by a hash of all three. Several processes may ask at once: one compiles behind a
lock, the others wait and load what it made. Nothing here imports Paddle.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "custom_ops"
LIBRARY = "ernie5_kernels.so"
INSTALLED = "ernie5_kernels"  # the package that custom_ops/setup.py installs
KEY_FILE = "key.txt"
CACHE_VARIABLE = "ERNIE5_KERNEL_CACHE"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi")
BINDING_FLAGS = ("-DPADDLE_WITH_CUSTOM_KERNEL", "-O1", "-w")  # glue only: Paddle's headers take long enough
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


def source_key(sources: Path = SOURCES) -> str:
    """Hash of what the library must fit: sources, flags, Paddle, Python and processor."""
    digest = hashlib.sha256()
    for path in sorted(p for p in sources.rglob("*") if p.suffix in (".cc", ".h")):
        digest.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    facts = (*FLAGS, *BINDING_FLAGS, _paddle_version(), sys.version, _processor())
    digest.update("\n".join(facts).encode())
    return digest.hexdigest()[:16]


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
    """The library of the present sources: installed, cached, or compiled now. Raises BuildError with one line."""
    key = source_key()
    library = installed_library(key)
    if library is not None:
        return library
    folders = list(cache_folders())
    for folder in folders:
        if (folder / key / LIBRARY).is_file():
            return folder / key / LIBRARY
    if compiler() is None:
        raise BuildError(f"no C++ compiler ({os.environ.get('CXX') or 'g++'} not found; Debian: apt-get install g++)")
    problem = ""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid() and folder != folders[0]:
                raise OSError("belongs to another user")
            with _locked(folder / f"{key}.lock", quiet):
                target = folder / key
                if not (target / LIBRARY).is_file():
                    _build_into(target, quiet)
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


def _build_into(target: Path, quiet: bool) -> None:
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
        compile_library(made / LIBRARY, objects)
        (made / KEY_FILE).write_text(target.name + "\n", encoding="utf-8")
        made.rename(target)
    if not quiet:
        print(f"ernie5: kernels ready after {time.monotonic() - started:.0f} s", file=sys.stderr)


def compile_library(output: Path, objects: Path, sources: Path = SOURCES, flags: tuple[str, ...] = FLAGS) -> None:
    """Every ``custom_ops/**/*.cc`` into the shared library ``output``, a compiler a core; ``objects``: a folder."""
    units = sorted(sources.glob("*/*.cc"))
    jobs = [(sources / BINDING, (*flags, *binding_flags())), *((unit, flags) for unit in units)]
    link_objects(output, _compile_all(jobs, objects, sources), (str(paddle_folder() / "base" / "libpaddle.so"),))


def compile_plain(output: Path, objects: Path, extra: tuple[str, ...] = (), sources: Path = SOURCES) -> None:
    """The kernels alone, with their C launchers and without Paddle; ``extra`` flags may ask for a sanitizer."""
    flags = tuple(flag for flag in FLAGS if flag != "-fvisibility=hidden") + extra
    jobs = [(unit, flags) for unit in sorted(sources.glob("*/*.cc"))]
    link_objects(output, _compile_all(jobs, objects, sources), extra)


def _compile_all(jobs: list[tuple[Path, tuple[str, ...]]], objects: Path, sources: Path) -> list[Path]:
    """The object of every (source, flags), in the folder ``objects`` under a name that says what it was made from."""
    headers = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources.rglob("*.h")))).digest()

    def compile_one(job: tuple[Path, tuple[str, ...]]) -> Path:
        unit, flags = job
        facts = "\n".join((*flags, _paddle_version(), compiler() or "", _processor())).encode()
        key = hashlib.sha256(headers + unit.read_bytes() + facts).hexdigest()[:16]
        output = objects / f"{'_'.join(unit.relative_to(sources).with_suffix('').parts)}-{key}.o"
        if not output.exists():
            part = output.with_suffix(f".{os.getpid()}.part")
            _run([compiler(), *flags, f"-I{sources}", "-c", str(unit), "-o", str(part)])
            part.rename(output)
        return output

    with ThreadPoolExecutor(max_workers=min(len(os.sched_getaffinity(0)), 8)) as pool:
        return list(pool.map(compile_one, jobs))


def link_objects(output: Path, objects: list[Path], extra: tuple[str, ...]) -> None:
    _run([compiler(), "-shared", *map(str, objects), *extra, "-ldl", "-lpthread", "-o", str(output)])


def binding_flags() -> tuple[str, ...]:
    import sysconfig

    include = paddle_folder() / "include"
    folders = (include, include / "third_party", Path(sysconfig.get_paths()["include"]))
    cuda = ("-DPADDLE_WITH_CUDA",) if _paddle_version().startswith("paddlepaddle-gpu") else ()
    return (*BINDING_FLAGS, *cuda, *(f"-I{folder}" for folder in folders))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise BuildError(f"{Path(command[0]).name} failed: {reason.strip()}")


if __name__ == "__main__":  # tools/setup.sh: a machine without a compiler is told, and goes on with the references
    try:
        find_or_build()
    except BuildError as problem:
        print(f"ernie5: the kernels are not compiled ({problem}); every op runs its slower reference", file=sys.stderr)
