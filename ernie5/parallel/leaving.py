"""Lets a process end while others still hang up on the store that it serves.

The thread that serves Paddle's ``TCPStore`` lives on while a process runs its exit handlers. The first time that a
client hangs up, it makes ready a log statement of glog; when glog's own state is destroyed by then, glog aborts, and a
rank whose work is done ends with SIGABRT (Paddle 3.3.1; three of ninety runs of two processes). A statement that is
ready needs that state no more: ``prepare`` has a client hang up, in both ways that TCP knows, early on.
"""

from __future__ import annotations

import functools
import socket
import struct

from paddle.base import core

HOST = "127.0.0.1"
SECONDS = 10
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time


@functools.cache
def prepare() -> None:
    """Once a process, before it ends; takes a few milliseconds. No store need exist."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    store = core.TCPStore(HOST, port, True, 1, SECONDS)
    with socket.create_connection((HOST, port), SECONDS) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    with socket.create_connection((HOST, port), SECONDS) as client:
        client.shutdown(socket.SHUT_WR)
        client.recv(1)  # nothing, when the store's thread has seen it
    del store
