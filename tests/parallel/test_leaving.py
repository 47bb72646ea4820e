"""A process that serves a store ends well while a client hangs up on it."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("leaving_script.py")
AFTER_PADDLE = 1.5  # seconds from the end of the program, when only the handler that sleeps is left


@pytest.mark.parametrize("linger", [None, struct.pack("ii", 1, 0)], ids=["closed", "reset"])
def test_a_client_that_hangs_up_while_the_process_ends(linger):
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        client = socket.create_connection(("127.0.0.1", int(process.stdout.readline())))
        if linger is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(AFTER_PADDLE)
        assert process.poll() is None
        client.close()
        assert process.wait(20) == 0
