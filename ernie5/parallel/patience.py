"""gloo's own time-out: thirty seconds, which Paddle gives no way to change. ``lift`` makes it a day.

A rank that compiles kernels, saves or is merely slow keeps the others waiting longer than that, and a collective that
has timed out cannot be entered again. How long a wait may last is the watchdog's business. gloo keeps the number in two
objects (``gloo::Context``, ``gloo::transport::Context``, reached from Paddle's ``GlooCommContext``); their layout is
that of the library in Paddle 3.3.1, and everything around the number is checked before it is written.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import paddle

SHIPPED = 30_000  # milliseconds
LIFTED = 24 * 3_600_000
_GET = "_ZNK3phi11distributed18CommContextManager3GetERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
_INSTANCE = "_ZZN3phi11distributed18CommContextManager11GetInstanceEvE8instance"
# Byte offsets: rank and size (int32 each) stand in all three objects behind the table of virtual functions.
_MEMBERS, _CONTEXT = 8, 16  # of GlooCommContext
_TRANSPORT, _CONTEXT_TIMEOUT = 40, 64  # of gloo::Context
_TRANSPORT_TIMEOUT = 80  # of gloo::transport::Context


class _String(ctypes.Structure):
    """std::string of libstdc++ with at most 15 characters."""

    _fields_ = [("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("here", ctypes.c_char * 16)]


def lift(group_id: int, rank: int, size: int) -> None:
    """Raises the time-out of a gloo group of this process, where it has ``rank`` of ``size``."""
    text = str(group_id).encode()
    key = _String(None, len(text), text)
    key.data = ctypes.addressof(key) + _String.here.offset
    communicator = _library().get(_library().instance, ctypes.addressof(key))
    context = _word(communicator + _CONTEXT)
    transport = _word(context + _TRANSPORT)
    for thing in (communicator, context, transport):
        found = (ctypes.c_int32 * 2).from_address(thing + _MEMBERS)
        assert tuple(found) == (rank, size), f"gloo's objects look otherwise here: {tuple(found)} for {rank}, {size}"
    for address in (context + _CONTEXT_TIMEOUT, transport + _TRANSPORT_TIMEOUT):
        assert _word(address) == SHIPPED, f"gloo's time-out is not {SHIPPED} ms but {_word(address)}"
        ctypes.c_int64.from_address(address).value = LIFTED


def _word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


class _Library:
    def __init__(self) -> None:
        library = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libphi_core.so"))
        self.get = getattr(library, _GET)
        self.get.restype, self.get.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
        self.instance = ctypes.addressof(ctypes.c_char.in_dll(library, _INSTANCE))


@lru_cache(maxsize=1)
def _library() -> _Library:
    return _Library()
