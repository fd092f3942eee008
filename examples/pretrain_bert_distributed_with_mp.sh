#!/usr/bin/env bash
# A BERT with 345M parameters on one node, cut by tensor and pipeline parallelism: tensor 2 x pipeline 2 x data 2 on 8 GPUs.
#
#   CHECKPOINT_PATH=... VOCAB_FILE=... DATA_PATH=..._text_sentence bash examples/pretrain_bert_distributed_with_mp.sh [flags]
#
# Flags given are added; GPUS_PER_NODE (8) and MASTER_PORT (6000) may be set.
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
MASTER_PORT=${MASTER_PORT:-6000}
: "${CHECKPOINT_PATH:?is where checkpoints go}"
: "${VOCAB_FILE:?is the vocabulary file}"
: "${DATA_PATH:?is the prefix of the token files}"

cd "$(dirname "$0")/.."
torchrun --nproc_per_node "$GPUS_PER_NODE" --nnodes 1 --node_rank 0 --master_addr localhost --master_port "$MASTER_PORT" \
    pretrain_bert.py \
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 --max-position-embeddings 512 \
    --micro-batch-size 2 --global-batch-size 16 --fp16 \
    --lr 0.0001 --min-lr 1.0e-5 --lr-decay-style linear --lr-warmup-fraction .01 --lr-decay-iters 990000 \
    --train-iters 1000000 --weight-decay 1e-2 --clip-grad 1.0 \
    --data-path "$DATA_PATH" --vocab-file "$VOCAB_FILE" --split 949,50,1 \
    --save "$CHECKPOINT_PATH" --load "$CHECKPOINT_PATH" --log-interval 100 --save-interval 10000 \
    --eval-interval 1000 --eval-iters 10 \
    "$@"
