"""Pre-trains the model of a run on its coded corpus; RUN_DIR must hold tokenizers/ and data/train/.

    python tools/pretrain.py fleet_configs/quickstart.yaml trainer.max_steps=4000
    python tools/launch.py --nproc_per_node 4 tools/pretrain.py CONFIG parallel.tensor=2

An interrupted run of the same configuration continues from its newest checkpoint, bit-equal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ernie5.config import Config, load_config
from ernie5.parallel.watchdog import last_words


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        config = load_config(options.config, options.overrides)
        pretrain(config, "resume" if options.resume else "fresh" if options.fresh else "auto")
    except ValueError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        last_words(str(error), code=2)
        return 2
    return 0


def pretrain(config: Config, choice: str = "auto") -> None:
    """Builds dataset, model and trainer from ``config`` and trains; ``choice`` as in ``ernie5.trainer.start``."""
    from ernie5.checkpoint import ALONE
    from ernie5.model import Ernie5Config, Ernie5ForCausalLM
    from ernie5.parallel.layout import Layout, world_size
    from ernie5.trainer import Ernie5Trainer, record_start, start, training_arguments

    run_dir = Path(config.run.dir)
    layout = Layout(config.parallel, world_size())
    dataset = build_dataset(config, run_dir, layout.rows)
    shape, worker, processes = Ernie5Config.from_model_config(config.model), None, ALONE
    if layout.ranks > 1:
        from ernie5.parallel.worker import Worker

        worker = Worker(shape, config.parallel, config.trainer.seed, config.trainer.bf16)
        processes = worker.processes
    resume = processes.on_first(lambda: start(config, run_dir, choice))
    model = worker.model if worker else Ernie5ForCausalLM(shape, seed=config.trainer.seed)
    if config.trainer.bf16 and not worker:
        model.to_bfloat16()
    args = training_arguments(config, run_dir)
    trainer = Ernie5Trainer(model=model, args=args, train_dataset=dataset, worker=worker)
    processes.on_first(lambda: record_start(config, run_dir, trainer.shapes))
    trainer.train(resume=resume)
    if processes.first:
        print(f"{run_dir}/checkpoints/final: weights after {config.trainer.max_steps} steps")


def build_dataset(config: Config, run_dir: Path, readers: int = 1) -> object:
    """``PackedDataset`` over ``RUN_DIR/data/train``, which must have been coded by the run's own tokenizers."""
    from ernie5.data import CodedCorpus, PackedDataset, fingerprint
    from ernie5.tokenizers.text import TextTokenizer

    tokenizers = run_dir / "tokenizers"
    text = TextTokenizer.load(tokenizers / "text")
    if text.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{tokenizers / 'text'} has {text.vocab_size} ids, model.vocab_size is {config.model.vocab_size}; "
            "raise it, or train the text tokenizer anew"
        )
    corpus = CodedCorpus.load(run_dir / "data" / "train", fingerprint(tokenizers))
    return PackedDataset(corpus, text, config, seed=config.data.seed, readers=readers)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as trainer.max_steps=50")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue a run even if the configuration has changed since")
    how.add_argument("--fresh", action="store_true", help="remove an earlier run's checkpoints and logs, start anew")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
