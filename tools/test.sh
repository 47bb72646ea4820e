#!/usr/bin/env bash
# Sets up as tools/setup.sh does, then runs the test suite; arguments go to pytest:
#   tools/test.sh tests/config -k preset        tools/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in -h | --help) sed -n '2,3s/^# //p' "$0" && exit 0 ;; esac
source tools/setup.sh
# Two processes with one thread each beat one process with two on small tensors; a file stays in one process, so that
# what its fixtures train is trained once.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
workers=(-n "${ERNIE5_TEST_WORKERS:-2}" --dist loadfile)
exec "$VENV_PYTHON" -m pytest -q "${workers[@]}" "$@"
