#!/usr/bin/env bash
# The main job on real Chinese text, in minutes: fetch a sample, clean it, train a tokenizer, preprocess, pretrain a
# pyramid-residual MoE, evaluate, generate, plot.
#
#   make demo                            # sets up .venv first
#   bash examples/demo.sh                # in an environment that has megatron_moe
#   DEMO_DIR=/tmp/demo bash examples/demo.sh --train-iters 50     # elsewhere, shorter; flags go to pretrain
#
# Without a GPU it runs on 4 CPU processes (gloo) with tensor, pipeline and expert parallelism at once; with GPUs on
# as many of them as make a power of two, up to 4. A second call goes on where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

PY=${PY:-python3}
DEMO_DIR=${DEMO_DIR:-runs/demo}
DATA=$DEMO_DIR/data
RUN=$DEMO_DIR/tiny-cpu
VOCAB_SIZE=4000
MARGIN=${MARGIN:-0.8}
PROMPTS=("曹操" "北京" "中国经济")

say() { printf '\n==> [%dm%02ds] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

GPUS=$("$PY" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
if [ "$GPUS" -ge 4 ] || [ "$GPUS" -eq 0 ]; then
    PROCESSES=4
    PARALLEL_ARGS=(--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
                   --expert-model-parallel-size 2 --expert-tensor-parallel-size 1)
elif [ "$GPUS" -ge 2 ]; then
    PROCESSES=2
    PARALLEL_ARGS=(--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1)
else
    PROCESSES=1
    PARALLEL_ARGS=()
fi
# Four processes on two cores: one thread each, or they stand in each other's way.
[ "$GPUS" -gt 0 ] || export OMP_NUM_THREADS=1
launch() { "$PY" -m megatron_moe.torchrun --standalone --nproc-per-node "$PROCESSES" -m "$@"; }

say "real Chinese text: People's Daily of January 1998, and Romance of the Three Kingdoms"
"$PY" tools/fetch_sample_corpus.py --output-dir "$DATA"

say "cleaning: WuDao's rules, equal and similar documents dropped"
"$PY" tools/clean_wudao.py --input "$DATA/wudao" --output "$DATA/clean" --workers 2
"$PY" tools/clean_wudao.py --input "$DATA/heldout.jsonl" --text-key text --dedup none --output "$DATA/clean-heldout"

say "a byte-fallback BPE tokenizer of $VOCAB_SIZE pieces"
"$PY" tools/build_tokenizer.py --input "$DATA/clean" --output "$DATA/tokenizer" --vocab-size "$VOCAB_SIZE"
TOKENIZER_MODEL=$DATA/tokenizer/tokenizer.model

say "token files"
"$PY" tools/preprocess_data.py --input "$DATA/clean" --output-prefix "$DATA/train" \
    --tokenizer-model "$TOKENIZER_MODEL" --workers 2
"$PY" tools/preprocess_data.py --input "$DATA/clean-heldout" --output-prefix "$DATA/heldout" \
    --tokenizer-model "$TOKENIZER_MODEL" --workers 2

say "pretraining on $PROCESSES processes ${PARALLEL_ARGS[*]:-}"
launch megatron_moe.pretrain --recipe tiny-cpu "${PARALLEL_ARGS[@]}" \
    --train-data-path "$DATA/train" --valid-data-path "$DATA/heldout" --tokenizer-model "$TOKENIZER_MODEL" \
    --save "$RUN" --load "$RUN" --save-interval 200 --keep-last 2 --log-interval 10 "$@"

say "evaluation on all held-out text, in one process: a checkpoint loads under any layout"
"$PY" -m megatron_moe.evaluate --load "$RUN" --data-path "$DATA/heldout" --output "$RUN/evaluation.json"

say "generation"
"$PY" -m megatron_moe.generate --load "$RUN" --prompt "${PROMPTS[@]}" --max-new-tokens 40 --temperature 0.8 \
    --top-p 0.9 --seed 1

say "plot"
# The loss of a model that ignores context, as a line to fall below.
UNIGRAM=$("$PY" -c '
import sys
from megatron_moe.data.stats import unigram_entropy
print(unigram_entropy(sys.argv[1], int(sys.argv[2])))
' "$DATA/heldout" "$VOCAB_SIZE")
"$PY" tools/plot_run.py --run "$RUN" --output "$RUN/training.png" --unigram-entropy "$UNIGRAM"

say "done"
"$PY" tools/summarize_run.py --run "$RUN" --train-prefix "$DATA/train" --heldout-prefix "$DATA/heldout" \
    --tokenizer-model "$TOKENIZER_MODEL" --require-margin "$MARGIN"
cat <<END

picture          $RUN/training.png; $RUN/training.html moves the experts' load through time
metrics          $RUN/metrics.jsonl, $RUN/expert_load.jsonl; tensorboard --logdir $RUN
checkpoint       $RUN (config.yaml says every flag)
next             python -m megatron_moe.generate --load $RUN --prompt 刘备 --max-new-tokens 60
                 python -m megatron_moe.score --load $RUN --input FILE.jsonl --output scores.jsonl
                 python -m megatron_moe.pretrain --recipe pai-gpt-moe-16b --vocab-size 50000 --dry-run
                 examples/ holds launch scripts for GPUs and Slurm
END
