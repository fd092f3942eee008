#!/usr/bin/env bash
# T5, an encoder stage and a decoder stage, in about a minute on two cores:   bash examples/t5/laptop.sh [flags]
#
# From text to a trained model with the commands of the full-size example; flags given are added to those of training.
# Writes to runs/t5 (RUN_DIR=... elsewhere).
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
RUN_DIR=${RUN_DIR:-$ROOT/runs/t5}
source "$ROOT/examples/laptop_data.sh"

wordpiece_data
train 2 pretrain_t5.py \
    --encoder-num-layers 2 --decoder-num-layers 2 --hidden-size 64 --num-attention-heads 4 --kv-channels 16 \
    --ffn-hidden-size 256 --encoder-seq-length 128 --decoder-seq-length 64 --max-position-embeddings 128 \
    --micro-batch-size 8 --global-batch-size 16 --train-iters 60 --weight-decay 1e-2 --clip-grad 1.0 \
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style linear --lr-decay-iters 60 --lr-warmup-fraction .1 \
    --vocab-extra-ids 100 --init-method-std 0.015 \
    --encoder-pipeline-model-parallel-size 1 --pipeline-model-parallel-size 1 \
    --data-path "$RUN_DIR/prose_text_sentence" --vocab-file "$RUN_DIR/vocab.txt" --split 900,50,50 \
    --log-interval 10 --eval-interval 30 --eval-iters 2 --save-interval 60 \
    "$@"
