#!/usr/bin/env bash
# T5 "base" with about 220M parameters, as published: one node of 8 GPUs, data-parallel.
#
#   bash examples/t5/train_t5_220m_distributed.sh CHECKPOINT_PATH TENSORBOARD_DIR VOCAB_FILE DATA_PATH [flags]
#
# The four may be environment variables instead; flags that follow them are added. On several nodes set NUM_NODES, NODE_RANK
# and MASTER_ADDR. DATA_PATH is a prefix without extension, such as my-t5_text_sentence.
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}

CHECKPOINT_PATH=${1:-${CHECKPOINT_PATH:?is where checkpoints go}}
TENSORBOARD_DIR=${2:-${TENSORBOARD_DIR:?is where TensorBoard files go}}
VOCAB_FILE=${3:-${VOCAB_FILE:?is the cased WordPiece vocabulary, bert-large-cased-vocab.txt}}
DATA_PATH=${4:-${DATA_PATH:?is the prefix of the token files, ..._text_sentence}}
MORE=("${@:5}")

DISTRIBUTED_ARGS=(
    --nproc_per_node "$GPUS_PER_NODE"
    --nnodes "$NUM_NODES"
    --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR"
    --master_port "$MASTER_PORT"
)

T5_ARGS=(
    --encoder-num-layers 12
    --decoder-num-layers 12
    --hidden-size 768
    --num-attention-heads 12
    --kv-channels 64
    --ffn-hidden-size 3072
    --encoder-seq-length 512
    --decoder-seq-length 128
    --max-position-embeddings 512
    --micro-batch-size 64
    --global-batch-size 512
    --lr 0.0001
    --train-iters 1000000
    --lr-decay-iters 1000000
    --lr-decay-style linear
    --min-lr 0.00001
    --weight-decay 1e-2
    --lr-warmup-fraction .01
    --clip-grad 1.0
    --bf16
    --vocab-extra-ids 100
    --init-method-std 0.015
    --transformer-impl transformer_engine
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
)

DATA_ARGS=(
    --data-path "$DATA_PATH"
    --vocab-file "$VOCAB_FILE"
    --tokenizer-type BertWordPieceCase
    --split 99982,9,9
)

OUTPUT_ARGS=(
    --log-interval 100
    --tensorboard-dir "$TENSORBOARD_DIR"
    --save-interval 500
    --eval-interval 1000
    --eval-iters 10
    --distributed-backend nccl
    --save "$CHECKPOINT_PATH"
    --load "$CHECKPOINT_PATH"
)

cd "$(dirname "$0")/../.."
torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_t5.py \
    "${T5_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" \
    ${MORE[@]+"${MORE[@]}"}
