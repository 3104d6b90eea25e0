#!/bin/sh
# Print the path of a Python that can make the virtual environment (3.12 or newer, with venv and pip), or say
# in one line what to install and exit 1. Called by the Makefile; a name given as an argument is the only one tried.
set -u

usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

candidates() {
    printf '%s\n' python3.12 python3 python
    # pyenv's shims answer only for the version selected here: look at what is installed as well.
    for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
        for found in "$root"/versions/3.12*/bin/python3.12; do
            [ -x "$found" ] && printf '%s\n' "$found"
        done
    done
    printf '%s\n' python3.13 python3.14
}

if [ $# -gt 0 ]; then
    tried=$1
else
    tried=$(candidates)
fi
IFS='
'
for python in $tried; do
    if usable "$python"; then
        # The interpreter itself, not a shim: a shim changes its mind with the directory.
        "$python" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done

if [ $# -gt 0 ]; then
    echo "PYTHON=$1: not a Python >= 3.12 with the venv and ensurepip modules" >&2
else
    echo "no Python >= 3.12 with venv found: install python3.12 and python3.12-venv (or: pyenv install 3.12)," \
        "or name one with PYTHON=/path/to/python3.12" >&2
fi
exit 1
