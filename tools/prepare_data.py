"""Encodes the training data of a run with its tokenizers, into RUN_DIR/data/train.

python tools/prepare_data.py fleet_configs/quickstart.yaml data.manifests='[my_folder]'
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ernie5.config import load_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--force", action="store_true", help="encode again where a corpus exists")
    options = parser.parse_intermixed_args()
    try:
        prepare(options)
    except ValueError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(options: argparse.Namespace) -> None:
    from ernie5.data import CodedCorpus, fingerprint, fitting, raw_samples
    from ernie5.tokenizers.bundle import Tokenizers

    config = load_config(options.config, options.overrides)
    run_dir = Path(config.run.dir)
    folder, made_by = run_dir / "data" / "train", fingerprint(run_dir / "tokenizers")
    if (folder / "config.json").exists() and not options.force:
        CodedCorpus.load(folder, made_by)
        print(f"{folder} exists and belongs to these tokenizers; nothing to do (--force encodes anew)")
        return
    tokenizers = Tokenizers.load(run_dir / "tokenizers")
    print("rendering the raw samples", flush=True)
    samples = raw_samples(config, "train")
    coded = fitting(tokenizers.encode_samples(samples), tokenizers.text, config)
    corpus = CodedCorpus(coded, made_by)
    corpus.save(folder)
    print(f"{folder}: " + ", ".join(f"{task} {len(indices)}" for task, indices in corpus.tasks.items()))


if __name__ == "__main__":
    sys.exit(main())
