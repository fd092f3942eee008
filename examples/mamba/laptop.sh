#!/usr/bin/env bash
# A hybrid of Mamba-2 and attention, tensor 2, in half a minute on two cores:   bash examples/mamba/laptop.sh [flags]
#
# From text to a trained model with the commands of the full-size example; flags given are added to those of training.
# Writes to runs/mamba (RUN_DIR=... elsewhere). 256 is the least width of Mamba-2's 8 groups of heads of 64 channels.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
RUN_DIR=${RUN_DIR:-$ROOT/runs/mamba}
source "$ROOT/examples/laptop_data.sh"

bpe_data
train 2 pretrain_mamba.py \
    --spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec \
    --num-layers 4 --hidden-size 256 --num-attention-heads 4 --group-query-attention --num-query-groups 2 \
    --hybrid-attention-ratio 0.25 --hybrid-mlp-ratio 0.25 --seq-length 64 --max-position-embeddings 64 \
    --position-embedding-type none --untie-embeddings-and-output-weights --normalization RMSNorm --disable-bias-linear \
    --attention-dropout 0.0 --hidden-dropout 0.0 --init-method-std 0.02 \
    --micro-batch-size 4 --global-batch-size 8 --train-iters 60 --weight-decay 0.1 --clip-grad 1.0 \
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-decay-iters 60 --lr-warmup-fraction .1 \
    --tensor-model-parallel-size 2 --sequence-parallel \
    --data-path "$RUN_DIR/corpus_text_document" --vocab-file "$RUN_DIR/vocab.json" --merge-file "$RUN_DIR/merges.txt" \
    --split 900,50,50 \
    --log-interval 10 --eval-interval 30 --eval-iters 2 --save-interval 60 \
    "$@"
