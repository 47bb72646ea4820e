"""What tests/parallel/test_leaving.py starts: a process whose store loses a client while its exit handlers run.

The handler registered first runs last, after Paddle's, and keeps the process.
"""

from __future__ import annotations

import ctypes
import socket
import sys

ctypes.CDLL(None).__cxa_atexit(ctypes.CDLL(None).sleep, ctypes.c_void_p(3), None)

import ernie5  # noqa: E402, F401, before paddle  # isort: skip
from paddle.base import core  # noqa: E402

from ernie5.parallel import leaving  # noqa: E402


def main() -> None:
    leaving.prepare()
    with socket.socket() as free:
        free.bind((leaving.HOST, 0))
        port = free.getsockname()[1]
    store = core.TCPStore(leaving.HOST, port, True, 1, leaving.SECONDS)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))  # nobody ends its thread, as Paddle's groups keep theirs
    print(port, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
