#!/usr/bin/env bash
# Go on with a run, or start a new one from its weights.
#
# Needs: the GPUs and the memory of the run that LOAD names. Another number of processes and other sizes are fine:
#        a checkpoint can be read under any layout.
#
#   LOAD=runs/pr-moe-350m bash examples/continue_pretraining.sh
#       resumes where that run stopped: weights, optimizer, schedule and data position
#   LOAD=runs/pr-moe-350m bash examples/continue_pretraining.sh --train-tokens 400_000_000_000
#       the same, and further than was planned
#   LOAD=runs/pr-moe-350m SAVE=runs/law DATA_PATH=data/law \
#       bash examples/continue_pretraining.sh --train-tokens none --train-iters 2000 --lr 3e-5 --lr-warmup-iters 50
#       a new run (--finetune): only the weights are taken; step, data, schedule and optimizer start afresh
#
# All flags are those of LOAD's config.yaml unless they are given here. Flags behind the script's name win.
set -euo pipefail

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}

LOAD=${LOAD:?set LOAD to the directory of a run}
SAVE=${SAVE:-$LOAD}

MODEL_ARGS=(
    --config "$LOAD/config.yaml"
    --load "$LOAD"
    # How an earlier continuation was loaded stands in its config.yaml, too; it is not meant for this one.
    --no-no-load-optim
    --no-no-load-rng
)
if [[ $SAVE == "$LOAD" ]]; then
    MODEL_ARGS+=(--no-finetune)
else
    MODEL_ARGS+=(--finetune)
fi

# Sizes that are not set stay as the run had them.
MODEL_PARALLEL_ARGS=()
if [[ -n ${TP:-} ]]; then MODEL_PARALLEL_ARGS+=(--tensor-model-parallel-size "$TP"); fi
if [[ -n ${PP:-} ]]; then MODEL_PARALLEL_ARGS+=(--pipeline-model-parallel-size "$PP"); fi
if [[ -n ${CP:-} ]]; then MODEL_PARALLEL_ARGS+=(--context-parallel-size "$CP"); fi
if [[ -n ${EP:-} ]]; then MODEL_PARALLEL_ARGS+=(--expert-model-parallel-size "$EP"); fi
if [[ -n ${ETP:-} ]]; then MODEL_PARALLEL_ARGS+=(--expert-tensor-parallel-size "$ETP"); fi

DATA_ARGS=()
if [[ -n ${DATA_PATH:-} ]]; then
    read -ra DATA_PREFIXES <<<"$DATA_PATH"
    DATA_ARGS+=(--train-data-path none --valid-data-path none --data-path "${DATA_PREFIXES[@]}")
fi

LOGGING_ARGS=(
    --save "$SAVE"
)

# One node finds a free port by itself.
NODE_ARGS=(--standalone)
if ((NNODES > 1)); then
    NODE_ARGS=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PY:-python3}" -m torch.distributed.run --nproc-per-node "$GPUS_PER_NODE" "${NODE_ARGS[@]}" \
    -m megatron_moe.pretrain \
    "${MODEL_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}" "$@"
