"""Cases and float64 references of the kernels, called through their C launchers: NumPy and ctypes, no Paddle.

A module per op gives ``SIGNATURES`` (function -> ctypes argument types), ``cases(rng)``, ``run(call, case)`` and
``reference(case)`` (both dicts of arrays), and ``TOLERANCE``.
"""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
from collections.abc import Callable

import numpy as np


def names() -> list[str]:
    """Every op that has cases."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def module(name: str):
    return importlib.import_module(f"{__name__}.{name}")


def caller(library: ctypes.CDLL, signatures: dict[str, list]) -> Callable[..., object]:
    """``call(name, *args)``: the C function ``name``, arrays passed as pointers to their first element."""

    def call(name: str, *args: object) -> object:
        function = getattr(library, name)
        function.argtypes = signatures[name]
        return function(*(_argument(arg) for arg in args))

    return call


def _argument(value: object) -> object:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous, "kernels take contiguous arrays"
        return value.ctypes.data
    return value


def check(library: ctypes.CDLL, name: str, seed: int = 0) -> int:
    """Runs every case of ``name`` against its reference; returns how many. An AssertionError names the case."""
    op = module(name)
    call = caller(library, op.SIGNATURES)
    count = 0
    for number, case in enumerate(op.cases(np.random.default_rng(seed))):
        got, wanted = op.run(call, case), op.reference(case)
        assert set(got) == set(wanted), f"{name}: outputs {sorted(got)}, reference {sorted(wanted)}"
        sizes = {key: getattr(value, "shape", value) for key, value in case.items()}
        for key, value in wanted.items():
            compare(got[key], value, op.TOLERANCE, f"{name} case {number} {sizes}: {key}")
        count += 1
    return count


def compare(got: np.ndarray, wanted: np.ndarray, tolerance: object, where: str) -> None:
    """Integers must be equal; floats differ by at most ``tolerance`` of the largest value of the array or of 1."""
    if wanted.dtype.kind in "iub":
        np.testing.assert_array_equal(got, wanted, err_msg=where)
        return
    limit = tolerance if isinstance(tolerance, float) else 2e-5
    scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
    np.testing.assert_allclose(got / scale, wanted / scale, rtol=0, atol=limit, err_msg=where)
