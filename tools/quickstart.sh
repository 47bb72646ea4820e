#!/usr/bin/env bash
# Everything a newcomer needs: a virtual environment, the pinned requirements, tokenizers, the nano model trained on
# the embedded data, figures on held-out items, samples and a report. Finished stages are skipped on a second run.
#   tools/quickstart.sh [--run DIR] [--config FILE] [--force]
#   --run DIR      run directory (default: run.dir of the configuration, runs/quickstart)
#   --config FILE  configuration (default: fleet_configs/quickstart.yaml)
#   --force        repeat every stage, finished or not
#   --help         this text
# ERNIE5_PYTHON=/path/python3.11 chooses the interpreter, ERNIE5_VENV=/path another place for the environment.
set -euo pipefail
for argument in "$@"; do
    case "$argument" in -h | --help) sed -n '2,9s/^# //p' "${BASH_SOURCE[0]}" && exit 0 ;; esac
done
if ! source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"; then
    echo "quickstart: stage 'install' could not finish; the lines above say why. The same command tries again." >&2
    exit 1
fi
PYTHONPATH="$ERNIE5_ROOT${PYTHONPATH:+:$PYTHONPATH}" exec "$VENV_PYTHON" -m ernie5.quickstart "$@"
