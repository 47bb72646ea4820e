"""Compiles the kernels and installs them as the package ``ernie5_kernels``:

    python custom_ops/setup.py install

Without it they are compiled at first use into a cache; installing serves machines without a compiler at run time.
The library fits these sources, this Paddle and this processor; where one of them differs, it is not loaded. Where
Paddle is a CUDA build, nvcc compiles the CUDA kernels into it, for the GPUs of this machine or for those that
PADDLE_CUDA_ARCH_LIST names ("8.0 9.0").
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from ernie5.ops import build  # noqa: E402
from ernie5.ops.build import INSTALLED, KEY_FILE, LIBRARY  # noqa: E402


class BuildKernels(build_py):
    """Puts the compiled library and its key into the package's folder."""

    def run(self) -> None:
        folder = Path(self.build_lib) / INSTALLED
        folder.mkdir(parents=True, exist_ok=True)
        try:
            architectures, problem = build.cuda_targets()
            if problem:
                print(build.cuda_note(problem), file=sys.stderr)
                architectures = ()
            with tempfile.TemporaryDirectory() as scratch:
                build.compile_library(folder / LIBRARY, Path(scratch), architectures)
        except (build.BuildError, ValueError) as error:
            sys.exit(f"setup: {error}")
        (folder / KEY_FILE).write_text(build.source_key(architectures) + "\n", encoding="utf-8")
        (folder / "__init__.py").write_text('"""Compiled kernels; loaded by ernie5.ops.kernels."""\n', encoding="utf-8")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [str(Path(self.build_lib) / INSTALLED / name) for name in (LIBRARY, KEY_FILE, "__init__.py")]


class BinaryDistribution(Distribution):
    """Has setuptools install into the platform's folder."""

    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:  # setuptools writes build/ and *.egg-info where it runs
        os.chdir(work)
        setup(
            name="ernie5-kernels",
            version="0.1.0",
            description="Kernels of ernie5",
            packages=[INSTALLED],
            package_dir={INSTALLED: work},
            cmdclass={"build_py": BuildKernels},
            distclass=BinaryDistribution,
            zip_safe=False,
        )
        os.chdir(HERE)
        shutil.rmtree(work, ignore_errors=True)
