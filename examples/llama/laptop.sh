#!/usr/bin/env bash
# A Llama-shaped GPT, data 2 with a distributed optimizer, in about a minute on two cores:   bash examples/llama/laptop.sh [flags]
#
# From text to a trained model with the commands of the full-size example; flags given are added to those of training.
# Writes to runs/llama (RUN_DIR=... elsewhere).
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
RUN_DIR=${RUN_DIR:-$ROOT/runs/llama}
source "$ROOT/examples/laptop_data.sh"

bpe_data
train 2 pretrain_gpt.py \
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 4 --group-query-attention \
    --num-query-groups 2 --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope \
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights \
    --attention-dropout 0.0 --hidden-dropout 0.0 \
    --micro-batch-size 8 --global-batch-size 16 --train-iters 60 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 \
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 6 \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --data-path "$RUN_DIR/corpus_text_document" --vocab-file "$RUN_DIR/vocab.json" --merge-file "$RUN_DIR/merges.txt" \
    --split 900,50,50 \
    --log-interval 10 --eval-interval 30 --eval-iters 2 --save-interval 60 \
    "$@"
