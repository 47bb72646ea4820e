"""Trains one tokenizer of a run, or all three, and writes it to RUN_DIR/tokenizers/KIND.

python tools/train_tokenizer.py all fleet_configs/quickstart.yaml
python tools/train_tokenizer.py vision fleet_configs/quickstart.yaml tokenizers.vision.image_steps=200
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ernie5.config import Config, load_config


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.kind == "all":
        return train_all(options)
    try:
        config = load_config(options.config, options.overrides)
        folder = Path(config.run.dir) / "tokenizers" / options.kind
        if (folder / "config.json").exists() and not options.force:
            print(f"{folder} exists; nothing to do (--force trains it anew)")
            return 0
        start = time.perf_counter()
        train(options.kind, config, progress=not options.quiet).save(folder)
    except ValueError as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    print(f"{options.kind} tokenizer: {folder} ({time.perf_counter() - start:.0f} s)")
    return 0


def train_all(options: argparse.Namespace) -> int:
    """Exit code 0, or that of the first tokenizer that could not be trained; what else runs is then stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    flags = [flag for flag, given in (("--force", options.force), ("--quiet", options.quiet)) if given]
    single = {**os.environ, "OMP_NUM_THREADS": "1"}

    running: list[subprocess.Popen] = []

    def start(kind: str, *extra: str) -> None:
        command = [sys.executable, __file__, kind, options.config, *options.overrides, *flags, *extra]
        running.append(subprocess.Popen(command, env=single))

    try:
        start("text")
        if code := running[0].wait():
            return code
        running.clear()
        start("vision")
        start("audio", "--quiet")
        while running:
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                if process.returncode:
                    return process.returncode
    finally:
        for process in running:
            process.terminate()
            process.wait()
    return 0


def train(kind: str, config: Config, progress: bool) -> object:
    """The trained tokenizer of that kind, with its ``save(folder)``."""
    from ernie5.data import tokenizer_material

    material = tokenizer_material(config, kind)
    settings = getattr(config.tokenizers, kind)
    if kind == "text":
        from ernie5.tokenizers.text import TextTokenizer

        return TextTokenizer.train(material, settings.vocab_size, progress=progress)
    if kind == "vision":
        from ernie5.tokenizers.vision import VisionTokenizer

        return VisionTokenizer.train(settings, *material, progress=progress)
    from ernie5.tokenizers.audio import AudioTokenizer

    return AudioTokenizer.train(settings, *material, progress=progress)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["text", "vision", "audio", "all"])
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as tokenizers.vision.seed=1")
    parser.add_argument("--force", action="store_true", help="train again where a tokenizer exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
