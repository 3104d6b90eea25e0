#!/usr/bin/env bash
# Make a run of a Hugging Face checkpoint, to generate with, to score with, or to train on.
#
# Needs: disk for the run, and for the proof memory for the weights in float32, 4 bytes a parameter. No GPU.
#
#   HF=Mixtral-8x7B-v0.1 SAVE=runs/mixtral bash examples/convert_from_hf.sh
#   LOAD=runs/mixtral PROMPT=Once bash examples/generate.sh
#   LOAD=runs/mixtral SAVE=runs/mixtral-mine DATA_PATH=data/train bash examples/continue_pretraining.sh
#
# HF:   a folder on this machine: config.json, safetensors files, tokenizer. Nothing is downloaded.
# SAVE: a folder that is not there yet; it appears when it is complete and proved. A conversion that was killed goes on
#       with the same command.
# Flags behind the script's name are passed on and win: python tools/convert_checkpoint.py from-hf --help.
set -euo pipefail

HF=${HF:?set HF to the folder of a Hugging Face checkpoint}
SAVE=${SAVE:?set SAVE to the directory of the run to write}

TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")/../tools" && pwd)

exec "${PY:-python3}" "$TOOLS/convert_checkpoint.py" from-hf --hf "$HF" --save "$SAVE" "$@"
