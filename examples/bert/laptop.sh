#!/usr/bin/env bash
# BERT, tensor 2, in about a minute on two cores:   bash examples/bert/laptop.sh [flags]
#
# From text to a trained model with the commands of the full-size example; flags given are added to those of training.
# Writes to runs/bert (RUN_DIR=... elsewhere).
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
RUN_DIR=${RUN_DIR:-$ROOT/runs/bert}
source "$ROOT/examples/laptop_data.sh"

wordpiece_data
train 2 pretrain_bert.py \
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 \
    --micro-batch-size 8 --global-batch-size 16 --train-iters 60 --weight-decay 1e-2 --clip-grad 1.0 \
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style linear --lr-decay-iters 60 --lr-warmup-fraction .1 \
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 \
    --data-path "$RUN_DIR/prose_text_sentence" --vocab-file "$RUN_DIR/vocab.txt" --split 900,50,50 \
    --log-interval 10 --eval-interval 30 --eval-iters 2 --save-interval 60 \
    "$@"
