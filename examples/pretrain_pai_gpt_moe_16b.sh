#!/usr/bin/env bash
# Pretrain Alibaba PAI's Chinese GPT-MoE 16B: a pyramid of 32 and 64 experts with a residual MLP, top-1.
#
# Needs: 8 GPUs of 80 GB on one node.
#        Weights, gradients and optimizer state take 40.7 GiB of each GPU (--dry-run); activations come on top.
# Data:  DATA_PATH, a prefix written by tools/preprocess_data.py (or weights and prefixes in turn), and TOKENIZER_MODEL.
#
#   DATA_PATH=data/wudao TOKENIZER_MODEL=data/tokenizer/tokenizer.model bash examples/pretrain_pai_gpt_moe_16b.sh
#   NNODES=1 GPUS_PER_NODE=1 bash examples/pretrain_pai_gpt_moe_16b.sh --dry-run --world-size 8
#
# Two nodes: the same command on each, with NNODES=2 MASTER_ADDR=<first node>, and NODE_RANK=0 or NODE_RANK=1.
# Variables below can be set in front of the command. Flags behind the script's name are passed on and win.
# A run that was stopped goes on from its last checkpoint when the same command is given again.
set -euo pipefail

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}

TP=${TP:-1}   # tensor parallel
PP=${PP:-1}   # pipeline parallel
CP=${CP:-1}   # context parallel
EP=${EP:-8}   # expert parallel
ETP=${ETP:-1}  # tensor parallel inside an expert

DATA_PATH=${DATA_PATH:-data/wudao}
TOKENIZER_MODEL=${TOKENIZER_MODEL:-data/tokenizer/tokenizer.model}
SAVE=${SAVE:-runs/pai-gpt-moe-16b}

# The recipe alone says all of this; what one changes most is spelled out. A test keeps the two equal.
MODEL_ARGS=(
    --recipe pai-gpt-moe-16b
    --num-layers 24
    --hidden-size 2048
    --num-attention-heads 16
    --seq-length 2048
)

MOE_ARGS=(
    --num-experts 32 32 32 32 32 32 32 32 32 32 64 64
    --expert-interval 2
    --mlp-type residual
    --moe-router-topk 1
    --moe-aux-loss-coeff 0.01
    --moe-expert-capacity-factor 1.0
)

TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size 512
    --train-tokens 100_000_000_000
    --lr 1.2e-4
    --lr-decay-style cosine
    --lr-warmup-iters 119
    --fp16
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
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
    --tokenizer-type SentencePieceTokenizer
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
