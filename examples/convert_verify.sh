#!/usr/bin/env bash
# Compare a run with a Hugging Face folder: every weight, every key, and the logits of both on the same texts.
#
# Needs: memory for the weights in float32, 4 bytes a parameter. No GPU.
#
#   LOAD=runs/quickstart HF=exported bash examples/convert_verify.sh
#   LOAD=runs/quickstart HF=exported bash examples/convert_verify.sh --iteration 400
#
# Flags behind the script's name are passed on and win: python tools/convert_checkpoint.py verify --help.
set -euo pipefail

LOAD=${LOAD:?set LOAD to the directory of a run}
HF=${HF:?set HF to the folder of a Hugging Face checkpoint}

TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")/../tools" && pwd)

exec "${PY:-python3}" "$TOOLS/convert_checkpoint.py" verify --load "$LOAD" --hf "$HF" "$@"
