#!/usr/bin/env bash
# BERT with 340M parameters, as published: 16 nodes of 8 GPUs, tensor 8 x pipeline 16.
#
#   bash examples/bert/train_bert_340m_distributed.sh CHECKPOINT_PATH TENSORBOARD_LOGS_PATH VOCAB_FILE DATA_PATH [flags]
#
# on every node, with NODE_RANK and MASTER_ADDR set. The four may be environment variables instead; flags that follow
# them are added. DATA_PATH is a prefix without extension, such as my-bert_text_sentence.
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-16}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-8}
PIPELINE_PARALLEL=${PIPELINE_PARALLEL:-16}

CHECKPOINT_PATH=${1:-${CHECKPOINT_PATH:?is where checkpoints go}}
TENSORBOARD_LOGS_PATH=${2:-${TENSORBOARD_LOGS_PATH:?is where TensorBoard files go}}
VOCAB_FILE=${3:-${VOCAB_FILE:?is the WordPiece vocabulary, bert-vocab.txt}}
DATA_PATH=${4:-${DATA_PATH:?is the prefix of the token files, ..._text_sentence}}
MORE=("${@:5}")

DISTRIBUTED_ARGS=(
    --nproc_per_node "$GPUS_PER_NODE"
    --nnodes "$NUM_NODES"
    --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR"
    --master_port "$MASTER_PORT"
)

BERT_MODEL_ARGS=(
    --num-layers 24
    --hidden-size 1024
    --num-attention-heads 16
    --seq-length 512
    --max-position-embeddings 512
)

TRAINING_ARGS=(
    --micro-batch-size 4
    --global-batch-size 32
    --train-iters 1000000
    --weight-decay 1e-2
    --clip-grad 1.0
    --fp16
    --lr 0.0001
    --lr-decay-iters 990000
    --lr-decay-style linear
    --min-lr 1.0e-5
    --lr-warmup-fraction .01
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TENSOR_PARALLEL"
    --pipeline-model-parallel-size "$PIPELINE_PARALLEL"
)
if [ "$PIPELINE_PARALLEL" = 16 ]; then
    # 24 layers do not divide over 16 stages: the outer two take 5 each, the others 1.
    MODEL_PARALLEL_ARGS+=(--decoder-first-pipeline-num-layers 5 --decoder-last-pipeline-num-layers 5)
fi

DATA_ARGS=(
    --data-path "$DATA_PATH"
    --vocab-file "$VOCAB_FILE"
    --split 949,50,1
)

EVAL_AND_LOGGING_ARGS=(
    --log-interval 100
    --save-interval 10000
    --eval-interval 1000
    --eval-iters 10
    --save "$CHECKPOINT_PATH"
    --load "$CHECKPOINT_PATH"
    --tensorboard-dir "$TENSORBOARD_LOGS_PATH"
)

cd "$(dirname "$0")/../.."
torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_bert.py \
    "${BERT_MODEL_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    ${MORE[@]+"${MORE[@]}"}
