#!/usr/bin/env bash
# From raw text to a trained, resumable GPT on a CPU, in one command:   bash examples/first_light/run.sh
#
# Needs Python 3.10+ with pip (and its venv module) and the package index; no compiler, no GPU. Everything it makes goes
# to runs/first_light (RUN_DIR=... elsewhere) and .venv (VENV=... to use another environment).
set -euo pipefail
cd "$(dirname "$0")/../.."

RUN_DIR=${RUN_DIR:-runs/first_light}
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
STOP=${STOP:-180} ITERATIONS=${ITERATIONS:-360}   # the run stops after STOP iterations and is resumed to ITERATIONS
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}       # two ranks on two cores

step() { printf '\n=== %s\n' "$*"; }

step "environment: $VENV"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check ".[plot]"
bin="$VENV/bin"

mkdir -p "$RUN_DIR"
step "corpus: the sources of Python's standard library"
"$bin/python" examples/first_light/corpus.py "$RUN_DIR/corpus.jsonl" 8

step "tokenizer: byte-level BPE, 4096 tokens"
"$bin/python" tools/train_tokenizer.py --input "$RUN_DIR/corpus.jsonl" --vocab-size 4096 --output-dir "$RUN_DIR/tokenizer"

step "binarize"
"$bin/python" tools/preprocess_data.py --input "$RUN_DIR/corpus.jsonl" --output-prefix "$RUN_DIR/corpus" \
    --tokenizer-type GPT2BPETokenizer --vocab-file "$RUN_DIR/tokenizer/vocab.json" \
    --merge-file "$RUN_DIR/tokenizer/merges.txt" --append-eod --workers 1

train() {
    "$bin/torchrun" --nproc-per-node 2 --master-port "${MASTER_PORT:-29511}" pretrain_gpt.py \
        --num-layers 4 --hidden-size 192 --num-attention-heads 6 --seq-length 128 --max-position-embeddings 128 \
        --micro-batch-size 8 --global-batch-size 16 --train-iters "$ITERATIONS" \
        --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.1 --clip-grad 1.0 \
        --adam-beta2 0.95 --attention-dropout 0.0 --hidden-dropout 0.0 \
        --data-path "$RUN_DIR/corpus_text_document" --split 95,4,1 --data-cache-path "$RUN_DIR/cache" \
        --tokenizer-type GPT2BPETokenizer --vocab-file "$RUN_DIR/tokenizer/vocab.json" \
        --merge-file "$RUN_DIR/tokenizer/merges.txt" --make-vocab-size-divisible-by 64 \
        --use-distributed-optimizer --overlap-grad-reduce --num-workers 0 \
        --log-interval 10 --eval-interval 60 --eval-iters 4 --tensorboard-dir "$RUN_DIR/tensorboard" \
        --save "$RUN_DIR/checkpoints" --save-interval "$STOP" "$@"
}

rm -rf "$RUN_DIR/checkpoints" "$RUN_DIR/tensorboard"
step "train two data-parallel ranks, stop after $STOP iterations"
train --exit-interval "$STOP"

step "resume from the checkpoint, train to $ITERATIONS, evaluate"
train --load "$RUN_DIR/checkpoints"

step "a sample from the trained model"
"$bin/python" tools/generate_text.py --load "$RUN_DIR/checkpoints" --use-checkpoint-args --micro-batch-size 1 \
    --vocab-file "$RUN_DIR/tokenizer/vocab.json" --merge-file "$RUN_DIR/tokenizer/merges.txt" \
    --make-vocab-size-divisible-by 64 --prompt "def" --prompt "import" --out-seq-length 60 --top-k 5 --seed 7 \
    | tee "$RUN_DIR/sample.log" | sed -n '/successfully loaded/,$p'

step "where everything is"
"$bin/python" tools/plot_metrics.py "$RUN_DIR/checkpoints/metrics.jsonl" "$RUN_DIR/loss.png"
echo "metrics:     $RUN_DIR/checkpoints/metrics.jsonl"
echo "TensorBoard: $RUN_DIR/tensorboard   ($bin/tensorboard --logdir $RUN_DIR/tensorboard)"
echo "checkpoints: $RUN_DIR/checkpoints"
