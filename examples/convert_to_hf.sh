#!/usr/bin/env bash
# Export a trained model to Hugging Face, and prove that the folder computes what the model computes.
#
# Needs: disk for the folder, and for the proof memory for the weights in float32, 4 bytes a parameter. No GPU.
#
#   LOAD=runs/quickstart OUTPUT=exported bash examples/convert_to_hf.sh
#   LOAD=runs/pr-moe-350m OUTPUT=exported bash examples/convert_to_hf.sh --dtype bf16 --license apache-2.0
#
# OUTPUT: a folder that is not there yet; it appears when it is complete and proved. A conversion that was killed goes
#         on with the same command. Look at it with: python tools/convert_checkpoint.py inspect exported
# Flags behind the script's name are passed on and win: python tools/convert_checkpoint.py to-hf --help.
set -euo pipefail

LOAD=${LOAD:?set LOAD to the directory of a run}
OUTPUT=${OUTPUT:?set OUTPUT to the folder to write}

TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")/../tools" && pwd)

exec "${PY:-python3}" "$TOOLS/convert_checkpoint.py" to-hf --load "$LOAD" --output "$OUTPUT" "$@"
