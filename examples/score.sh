#!/usr/bin/env bash
# Log-probability of every token of given texts: compares checkpoints with each other and with other programs.
#
# Needs: memory for the weights, 2 bytes a parameter in bf16 or fp16 (4 with --eval-fp32), spread over TP x PP x EP
#        processes. The layout need not be the one of the training. Small models run without a GPU.
#
#   LOAD=runs/quickstart INPUT=texts.jsonl OUTPUT=scores.jsonl bash examples/score.sh
#   LOAD=runs/pai-gpt-moe-16b GPUS_PER_NODE=8 EP=8 INPUT=a.jsonl OUTPUT=b.jsonl bash examples/score.sh --eval-fp32
#
# INPUT:  JSON Lines with `text` or `ids`, each no longer than the positions of the model.
# OUTPUT: a line for each: ids, logprobs, sum, mean, perplexity.
# Flags behind the script's name are passed on and win: python -m megatron_moe.score --help.
set -euo pipefail

GPUS_PER_NODE=${GPUS_PER_NODE:-1}
TP=${TP:-1}   # tensor parallel
PP=${PP:-1}   # pipeline parallel
EP=${EP:-1}   # expert parallel
ETP=${ETP:-1}  # tensor parallel inside an expert

LOAD=${LOAD:?set LOAD to the directory of a run}
INPUT=${INPUT:?set INPUT to a file of texts}
OUTPUT=${OUTPUT:?set OUTPUT to the file to write}

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --expert-model-parallel-size "$EP"
    --expert-tensor-parallel-size "$ETP"
)

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PY:-python3}" -m torch.distributed.run --standalone --nproc-per-node "$GPUS_PER_NODE" \
    -m megatron_moe.score --load "$LOAD" "${MODEL_PARALLEL_ARGS[@]}" --input "$INPUT" --output "$OUTPUT" "$@"
