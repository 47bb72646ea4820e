"""Measures a trained run on held-out items: writes metrics.json and samples/, prints every figure beside its bound."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run that tools/pretrain.py made")
    parser.add_argument("--only", default="", metavar="KEY,KEY", help="measure these figures and keep the others")
    parser.add_argument(
        "--items", type=int, metavar="N", help="held-out items of a generated metric (run's own number)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed draws other held-out items")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="weights other than the run's newest")
    parser.add_argument("--out", type=Path, metavar="FILE", help="metrics file (RUN_DIR/metrics.json)")
    options = parser.parse_args()
    from ernie5.evaluation.requirements import formatted_table
    from ernie5.evaluation.run import evaluate  # loads paddle, which --help can do without

    only = [key.strip() for key in options.only.split(",") if key.strip()]
    try:
        if options.items is not None and options.items < 1:
            raise ValueError(f"--items: found {options.items}, expected a positive number")
        values = evaluate(options.run_dir, only, options.items, options.seed, options.checkpoint, options.out)
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    print(formatted_table(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
