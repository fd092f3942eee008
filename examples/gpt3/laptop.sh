#!/usr/bin/env bash
# GPT-3, tensor 2 x pipeline 2 with a growing batch, in about a minute on two cores:   bash examples/gpt3/laptop.sh [flags]
#
# From text to a trained model with the commands of the full-size example; flags given are added to those of training.
# Writes to runs/gpt3 (RUN_DIR=... elsewhere).
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
RUN_DIR=${RUN_DIR:-$ROOT/runs/gpt3}
source "$ROOT/examples/laptop_data.sh"

bpe_data
train 4 pretrain_gpt.py \
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 \
    --micro-batch-size 4 --global-batch-size 16 --rampup-batch-size 8 4 160 --train-samples 640 \
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.02 --clip-grad 1.0 \
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-decay-samples 640 --lr-warmup-fraction .1 \
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \
    --data-path "$RUN_DIR/corpus_text_document" --vocab-file "$RUN_DIR/vocab.json" --merge-file "$RUN_DIR/merges.txt" \
    --split 900,50,50 \
    --log-interval 10 --eval-interval 30 --eval-iters 2 --save-interval 60 \
    "$@"
