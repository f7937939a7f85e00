#!/bin/sh
# Fill .venv/ with errata and one of its extras: `scripts/set_up.sh report` or `scripts/set_up.sh dev`.
# A stamp says what is there; `dev` includes `docs` and `report`.
set -eu
cd "$(dirname "$0")/.."
extra=$1
venv=.venv
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_PYTHON_VERSION_WARNING=1

is_new_enough() {
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13 python}; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "set-up: error: no Python 3.11 or newer among: ${PYTHON:-python3.11 python3 python}." \
        "Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2
    return 1
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "set-up: making $venv with $("$python" --version)"
    rm -rf "$venv"
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        echo "set-up: error: $python cannot make a virtual environment." \
            "On Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
fi

if ! "$venv/bin/python" -c \
    'from importlib.metadata import version; assert version("torch").startswith("2.13.0")' 2>/dev/null; then
    echo "set-up: installing torch 2.13.0 (the largest download)"
    "$venv/bin/python" -m pip install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==2.13.0"
fi

echo "set-up: installing errata with its '$extra' extra"
"$venv/bin/python" -m pip install --quiet --editable ".[$extra]"

# Tests compare metrics with torch-fidelity. It wants torchvision, which must fit torch's build and is missing from
# some CPU-only indexes; the tests give it a stub. It lies apart, because torchmetrics imports it, and so
# torchvision, wherever it is installed.
if [ "$extra" = dev ]; then
    "$venv/bin/python" -m pip install --quiet --no-deps --upgrade \
        --target "$venv/without-dependencies" "torch-fidelity==0.4.0"
fi

touch "$venv/.ready-$extra"
if [ "$extra" = dev ]; then touch "$venv/.ready-report" "$venv/.ready-docs"; fi
