#!/usr/bin/env bash
# Let a trained model go on with a text.
#
# Needs: memory for the weights, 2 bytes a parameter in bf16 or fp16, spread over TP x PP x EP processes. The layout
#        need not be the one of the training. Small models run without a GPU.
#
#   LOAD=runs/quickstart PROMPT=北京 bash examples/generate.sh
#   LOAD=runs/quickstart PROMPT=北京 bash examples/generate.sh --greedy --max-new-tokens 100
#   LOAD=runs/pai-gpt-moe-16b GPUS_PER_NODE=8 EP=8 PROMPT_FILE=prompts.txt OUTPUT=out.jsonl bash examples/generate.sh
#
# Flags behind the script's name are passed on and win: python -m megatron_moe.generate --help.
set -euo pipefail

GPUS_PER_NODE=${GPUS_PER_NODE:-1}
TP=${TP:-1}   # tensor parallel
PP=${PP:-1}   # pipeline parallel
EP=${EP:-1}   # expert parallel
ETP=${ETP:-1}  # tensor parallel inside an expert

LOAD=${LOAD:?set LOAD to the directory of a run}

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --expert-model-parallel-size "$EP"
    --expert-tensor-parallel-size "$ETP"
)

INPUT_ARGS=()
if [[ -n ${PROMPT_FILE:-} ]]; then
    INPUT_ARGS+=(--prompt-file "$PROMPT_FILE")
else
    INPUT_ARGS+=(--prompt "${PROMPT:?set PROMPT to a text, or PROMPT_FILE to a file of them}")
fi
if [[ -n ${OUTPUT:-} ]]; then INPUT_ARGS+=(--output "$OUTPUT"); fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PY:-python3}" -m torch.distributed.run --standalone --nproc-per-node "$GPUS_PER_NODE" \
    -m megatron_moe.generate --load "$LOAD" "${MODEL_PARALLEL_ARGS[@]}" "${INPUT_ARGS[@]}" "$@"
