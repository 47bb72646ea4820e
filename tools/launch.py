"""Starts a script as several processes through Paddle's launcher, and again when one of them dies or hangs.

    python tools/launch.py --nproc_per_node 4 --max_restarts 3 tools/pretrain.py CONFIG parallel.pipeline=2
    python tools/launch.py --master 10.0.0.1:8090 --nnodes 2 --nproc_per_node 8 tools/pretrain.py CONFIG (on each host)

Options that are not listed here are those of python -m paddle.distributed.launch. A restart goes on from the newest
complete checkpoint. There is none after bad input (exit code 2), nor when two attempts in a row fail at the same step.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ernie5.config import load_config

PASSED_ON = {  # Paddle's options that most runs need
    "nproc_per_node": "processes on this host",
    "nnodes": "hosts",
    "master": "address:port on the first host, where the hosts meet",
    "devices": "the GPUs to use, such as 0,1,2,3",
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    first = next((i for i, text in enumerate(arguments) if text.endswith(".py")), len(arguments))
    own, script = arguments[:first], arguments[first:]
    options, others = _parser().parse_known_args(own)
    try:
        if not script:
            raise ValueError("no script is named; name one, such as tools/pretrain.py, and after it its arguments")
        if options.max_restarts < 0:
            raise ValueError(f"--max_restarts {options.max_restarts}; it must be at least 0")
        run_dir = Path(options.run_dir) if options.run_dir else _run_dir(script[1:])
        return _run(others, script, run_dir, options)
    except ValueError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2


def _run(others: list[str], script: list[str], run_dir: Path | None, options: argparse.Namespace) -> int:
    from ernie5.parallel.relaunch import Run, run

    logs = options.log_dir or str(run_dir / "log" if run_dir else "log")
    passed = [f"--{name}={value}" for name in PASSED_ON if (value := getattr(options, name)) is not None]
    what = Run([*passed, *others], script, logs, lambda: _reached(run_dir), lambda: _goes_on(run_dir))
    return run(what, options.max_restarts)


def _run_dir(arguments: list[str]) -> Path | None:
    """What the configuration among the script's arguments names, with the overrides beside it."""
    configs = [text for text in arguments if text.endswith((".yaml", ".yml"))]
    if not configs:
        return None
    overrides = [text for text in arguments if "=" in text and not text.startswith("-")]
    return Path(load_config(configs[0], overrides).run.dir)


def _reached(run_dir: Path | None) -> int | None:
    """The last step that the run has logged; None where nothing is known of it."""
    if run_dir is None:
        return None
    log = run_dir / "train_log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # a line that a kill cut off
            continue
    return 0


def _goes_on(run_dir: Path | None) -> str:
    if run_dir is None:
        return "from wherever the script takes up its work"
    from ernie5.checkpoint import step_checkpoints

    found = step_checkpoints(run_dir)
    return f"from {found[-1]}" if found else f"from the beginning: {run_dir} has no checkpoint yet"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="launch.py [options] [options of paddle.distributed.launch] SCRIPT.py [its arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, text in PASSED_ON.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("--max_restarts", type=int, default=3, help="further attempts after the first (default 3)")
    parser.add_argument(
        "--run_dir", help="where checkpoints and log of the run lie; default: as its configuration says"
    )
    parser.add_argument("--log_dir", help="for the output of every rank; default: log in the run's folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
