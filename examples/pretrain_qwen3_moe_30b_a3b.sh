#!/usr/bin/env bash
# Pretrain a model of the shape of Qwen3-30B-A3B: 128 experts in each of 48 layers, 8 of them for a token.
#
# Needs: 32 GPUs of 80 GB on four nodes.
#        Weights, gradients and optimizer state take 23.0 GiB of each GPU (--dry-run); activations come on top.
# Data:  DATA_PATH, a prefix written by tools/preprocess_data.py (or weights and prefixes in turn), and TOKENIZER_MODEL.
#
#   DATA_PATH=data/corpus TOKENIZER_MODEL=data/qwen3-tokenizer bash examples/pretrain_qwen3_moe_30b_a3b.sh
#   NNODES=1 GPUS_PER_NODE=1 bash examples/pretrain_qwen3_moe_30b_a3b.sh --dry-run --world-size 32
#
# Give the command on each of the 4 nodes, with MASTER_ADDR=<first node> and a NODE_RANK of 0 to 3.
# Variables below can be set in front of the command. Flags behind the script's name are passed on and win.
# A run that was stopped goes on from its last checkpoint when the same command is given again.
set -euo pipefail

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-4}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}

TP=${TP:-2}   # tensor parallel
PP=${PP:-2}   # pipeline parallel
CP=${CP:-1}   # context parallel
EP=${EP:-8}   # expert parallel
ETP=${ETP:-1}  # tensor parallel inside an expert

DATA_PATH=${DATA_PATH:-data/corpus}
TOKENIZER_MODEL=${TOKENIZER_MODEL:-data/qwen3-tokenizer}
SAVE=${SAVE:-runs/qwen3-moe-30b-a3b}

# The recipe alone says all of this; what one changes most is spelled out. A test keeps the two equal.
MODEL_ARGS=(
    --recipe qwen3-moe-30b-a3b
    --num-layers 48
    --hidden-size 2048
    --num-attention-heads 32
    --seq-length 4096
)

MOE_ARGS=(
    --num-experts 128
    --moe-ffn-hidden-size 768
    --moe-router-topk 8
    --moe-router-load-balancing-type global_aux_loss
    --moe-aux-loss-coeff 1.0e-3
)

TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size 1024
    --train-tokens 1_000_000_000_000
    --lr 3.0e-4
    --lr-decay-style cosine
    --lr-warmup-iters 2000
    --bf16
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --context-parallel-size "$CP"
    --expert-model-parallel-size "$EP"
    --expert-tensor-parallel-size "$ETP"
    --use-distributed-optimizer
)

read -ra DATA_PREFIXES <<<"$DATA_PATH"
DATA_ARGS=(
    --data-path "${DATA_PREFIXES[@]}"
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TOKENIZER_MODEL"
    --num-workers 2
)

LOGGING_ARGS=(
    --save "$SAVE"
    --load "$SAVE"
    --save-interval 1000
    --keep-last 3
    --log-interval 10
)

# One node finds a free port by itself.
NODE_ARGS=(--standalone)
if ((NNODES > 1)); then
    NODE_ARGS=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PY:-python3}" -m torch.distributed.run --nproc-per-node "$GPUS_PER_NODE" "${NODE_ARGS[@]}" \
    -m megatron_moe.pretrain \
    "${MODEL_ARGS[@]}" "${MOE_ARGS[@]}" "${TRAINING_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}" "$@"
