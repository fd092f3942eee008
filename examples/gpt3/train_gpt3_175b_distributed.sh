#!/usr/bin/env bash
# GPT-3 with 175B parameters, as published: 1,024 GPUs, tensor 8 x pipeline 16 x data 8.
#
#   bash examples/gpt3/train_gpt3_175b_distributed.sh \
#       CHECKPOINT_PATH TENSORBOARD_LOGS_PATH VOCAB_FILE MERGE_FILE DATA_PATH [flags]
#
# on every node, with NODE_RANK and MASTER_ADDR set (examples/slurm does that). The five may be environment variables
# instead; flags that follow them are added. DATA_PATH is a prefix without extension, such as my-gpt3_text_document.
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-128}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}

CHECKPOINT_PATH=${1:-${CHECKPOINT_PATH:?is where checkpoints go}}
TENSORBOARD_LOGS_PATH=${2:-${TENSORBOARD_LOGS_PATH:?is where TensorBoard files go}}
VOCAB_FILE=${3:-${VOCAB_FILE:?is gpt2-vocab.json}}
MERGE_FILE=${4:-${MERGE_FILE:?is gpt2-merges.txt}}
DATA_PATH=${5:-${DATA_PATH:?is the prefix of the token files, ..._text_document}}
MORE=("${@:6}")

DISTRIBUTED_ARGS=(
    --nproc_per_node "$GPUS_PER_NODE"
    --nnodes "$NUM_NODES"
    --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR"
    --master_port "$MASTER_PORT"
)

GPT_MODEL_ARGS=(
    --num-layers 96
    --hidden-size 12288
    --num-attention-heads 96
    --seq-length 2048
    --max-position-embeddings 2048
)

# A batch that grows is counted in samples, and so is the run: 500,000 iterations of 1,536 samples, of which the learning
# rate decays over 430,000. (The published list gave iterations, which do not go together with --rampup-batch-size.)
TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size 1536
    --rampup-batch-size 16 16 5859375
    --train-samples 768000000
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --init-method-std 0.006
    --clip-grad 1.0
    --fp16
    --lr 6.0e-5
    --lr-decay-style cosine
    --min-lr 6.0e-6
    --lr-warmup-fraction .001
    --lr-decay-samples 660480000
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 8
    --pipeline-model-parallel-size 16
)

DATA_ARGS=(
    --data-path "$DATA_PATH"
    --vocab-file "$VOCAB_FILE"
    --merge-file "$MERGE_FILE"
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
torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_gpt.py \
    "${GPT_MODEL_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}" \
    ${MORE[@]+"${MORE[@]}"}
