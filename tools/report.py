"""Writes report.html of a run directory from its metrics, log and samples."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ernie5.evaluation.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="where training and tools/evaluate.py wrote")
    options = parser.parse_args()
    try:
        print(f"report: {write_report(options.run_dir)}")
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
