#!/usr/bin/env bash
# Runs the tests marked gpu and the benchmarks that use one on a machine with an NVIDIA GPU, and says what failed.
#
#   make gpu-check                  with .venv
#   bash tools/gpu_check.sh         with python3 as it is (or PY=/path/to/python): nothing is downloaded
#
# Where nothing can be installed, put the wheels that python3 lacks (megatron-core, say) into .whl/: they are
# unpacked into a temporary folder. Exit code: 0 all passed, 1 something failed, 2 cannot start, 3 no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PY=${PY:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

stop() {
    echo "gpu-check: $1" >&2
    exit "$2"
}

use_carried_wheels() {
    shopt -s nullglob
    local wheels=(.whl/*.whl)
    shopt -u nullglob
    [ ${#wheels[@]} -gt 0 ] ||
        stop "no megatron-core: pip install 'megatron-core>=0.19,<0.20', or put its wheel into .whl/" 2
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    echo "==> unpacking ${wheels[*]}"
    "$PY" -m pip install -q --no-index --no-deps --disable-pip-version-check --target "$unpacked" "${wheels[@]}" ||
        stop "the wheels in .whl/ cannot be installed" 2
    export PYTHONPATH=$PYTHONPATH:$unpacked
}

"$PY" -c 'import torch' 2>/dev/null || stop "$PY cannot import torch: make venv, or name an interpreter with PY=" 2
"$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    stop "no GPU: torch sees none here ($("$PY" -c 'import torch; print(torch.__version__)')); nothing was run" 3
"$PY" -c 'import megatron.core.package_info' 2>/dev/null || use_carried_wheels

echo "==> doctor"
"$PY" -m megatron_moe.doctor || stop "doctor says that training cannot run here" 2

failed=()
# Only the files that hold such tests: others may import what this machine lacks.
mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu\b' tests)
if [ ${#files[@]} -eq 0 ]; then
    echo "==> no test is marked gpu"
    failed+=("tests (none found)")
else
    echo "==> gpu tests in ${#files[@]} files"
    "$PY" -m pytest -m gpu "${files[@]}" || failed+=("gpu tests")
fi

# The others measure processors, data tools or groups of ranks.
for benchmark in benchmarks/train_step.py benchmarks/moe_gpu.py; do
    echo "==> $benchmark"
    start=$SECONDS
    "$PY" "$benchmark" || failed+=("$benchmark")
    echo "==> $benchmark took $((SECONDS - start)) s"
done

[ ${#failed[@]} -eq 0 ] || stop "failed: $(printf '%s; ' "${failed[@]}")" 1
echo "==> gpu-check passed"
