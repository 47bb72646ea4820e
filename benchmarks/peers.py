#!/usr/bin/env python
"""Where the peers live, and the command that installs them.

    python benchmarks/peers.py                   torch and transformers into .venv-peers
    python benchmarks/peers.py --paddleformers   PaddleFormers as well, into .venv-peers-paddleformers

ERNIE5_PEERS_VENV=/path names another place. PaddleNLP is measured in the project's own environment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VARIABLE = "ERNIE5_PEERS_VENV"

OURS, TORCH, PADDLENLP, PADDLEFORMERS = "ours", "torch", "paddlenlp", "paddleformers"
REQUIREMENTS = {TORCH: "peers-requirements.txt", PADDLEFORMERS: "peers-paddleformers-requirements.txt"}

KEEP_MEMORY = {  # glibc keeps what is freed instead of handing it back to the kernel: every peer is faster so
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def environment_folder(kind: str) -> Path:
    """The virtual environment of ``TORCH`` or ``PADDLEFORMERS``."""
    folder = Path(os.environ.get(VARIABLE) or ROOT / ".venv-peers")
    return folder if kind == TORCH else folder.with_name(folder.name + "-paddleformers")


def interpreter(kind: str) -> Path | None:
    """The Python that runs contenders of this kind, or None where it is not installed."""
    if kind in (OURS, PADDLENLP):
        return Path(sys.executable)
    python = environment_folder(kind) / "bin" / "python"
    return python if python.exists() else None


def variables(kind: str, threads: int) -> dict[str, str]:
    """Environment of a contender's process: the setting in which it is fastest.

    Ours and PaddleNLP get theirs from ``import ernie5``, which does the same for both.
    """
    chosen = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if kind == TORCH:
        chosen |= {**KEEP_MEMORY, "MKL_NUM_THREADS": str(threads), "TORCHINDUCTOR_FREEZING": "0"}
    if kind == PADDLEFORMERS:
        chosen |= {**KEEP_MEMORY, **_fast_blas(), "FLAGS_use_stride_kernel": "1", "GLOG_minloglevel": "2"}
    return chosen


def _fast_blas() -> dict[str, str]:
    """Paddle's matmul is slow on AMD unless told otherwise."""
    vendor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return {"MKL_DEBUG_CPU_TYPE": "5"} if "AuthenticAMD" in vendor or "HygonGenuine" in vendor else {}


def how_to_install(kind: str) -> str:
    return "python benchmarks/peers.py" + (" --paddleformers" if kind == PADDLEFORMERS else "")


def install(kind: str) -> None:
    folder = environment_folder(kind)
    if not (folder / "bin" / "python").exists():
        print(f"peers: making {folder}")
        venv.EnvBuilder(with_pip=True).create(folder)
    print(f"peers: installing {REQUIREMENTS[kind]}")
    command = [folder / "bin" / "python", "-m", "pip", "install", "-q", "-r", HERE / REQUIREMENTS[kind]]
    subprocess.run(command, check=True)
    print(f"peers: {kind} is ready in {folder}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paddleformers", action="store_true", help="install PaddleFormers as well")
    arguments = parser.parse_args()
    for kind in (TORCH, PADDLEFORMERS) if arguments.paddleformers else (TORCH,):
        try:
            install(kind)
        except subprocess.CalledProcessError as error:
            print(f"peers: pip could not install {REQUIREMENTS[kind]} (exit {error.returncode})", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
