#!/usr/bin/env bash
# Hybrids of Mamba-2, attention and MLP layers, as published: 800M parameters, or 8B, on one node of 8 GPUs.
#
#   bash examples/mamba/train.sh DATA_PATH TOKENIZER_PATH [flags]
#
# MODEL_SCALE=8B for the larger one. DATA_PATH is a prefix without extension, TOKENIZER_PATH a sentencepiece model; both may
# be environment variables instead, as are CHECKPOINT_PATH and TENSORBOARD_DIR. Flags that follow are added. On several
# nodes set NUM_NODES, NODE_RANK and MASTER_ADDR.
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}

DATA_PATH=${1:-${DATA_PATH:?is the prefix of the token files, ..._text_document}}
TOKENIZER_PATH=${2:-${TOKENIZER_PATH:?is a sentencepiece model}}
MORE=("${@:3}")

MODEL_SCALE=${MODEL_SCALE:-800M}
case $MODEL_SCALE in
    800M) TENSOR_PARALLEL=1 LAYERS=48 HIDDEN=1024 HEADS=16 BATCH=32 ;;
    8B) TENSOR_PARALLEL=4 LAYERS=56 HIDDEN=4096 HEADS=32 BATCH=8 ;;
    *) echo "MODEL_SCALE is 800M or 8B, not $MODEL_SCALE" >&2; exit 2 ;;
esac
CHECKPOINT_PATH=${CHECKPOINT_PATH:-runs/hybrid-$MODEL_SCALE/checkpoints}
TENSORBOARD_DIR=${TENSORBOARD_DIR:-runs/hybrid-$MODEL_SCALE/tensorboard}

DISTRIBUTED_ARGS=(
    --nproc_per_node "$GPUS_PER_NODE"
    --nnodes "$NUM_NODES"
    --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR"
    --master_port "$MASTER_PORT"
)

MODEL_ARGS=(
    --spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec
    --num-layers "$LAYERS"
    --hidden-size "$HIDDEN"
    --num-attention-heads "$HEADS"
    --group-query-attention
    --num-query-groups 8
    --hybrid-attention-ratio 0.08
    --hybrid-mlp-ratio 0.5
    --seq-length 4096
    --max-position-embeddings 4096
    --position-embedding-type none
    --untie-embeddings-and-output-weights
    --normalization RMSNorm
    --disable-bias-linear
    --init-method-std 0.02
    --attention-dropout 0.0
    --hidden-dropout 0.0
)

TRAINING_ARGS=(
    --micro-batch-size 4
    --global-batch-size "$BATCH"
    --train-samples 73242188
    --lr-warmup-samples 50000
    --lr-decay-samples 73192188
    --lr 2.5e-4
    --min-lr 2.5e-5
    --lr-decay-style cosine
    --weight-decay 0.1
    --clip-grad 1.0
    --adam-beta1 0.9
    --adam-beta2 0.95
    --bf16
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TENSOR_PARALLEL"
    --sequence-parallel
    --pipeline-model-parallel-size 1
    --use-distributed-optimizer
    --overlap-param-gather
    --overlap-grad-reduce
)

DATA_ARGS=(
    --data-path "$DATA_PATH"
    --split 99,1,0
    --tokenizer-type GPTSentencePieceTokenizer
    --tokenizer-model "$TOKENIZER_PATH"
    --no-create-attention-mask-in-dataloader
)

OUTPUT_ARGS=(
    --log-interval 10
    --save-interval 2000
    --eval-interval 2000
    --eval-iters 32
    --save "$CHECKPOINT_PATH"
    --load "$CHECKPOINT_PATH"
    --tensorboard-dir "$TENSORBOARD_DIR"
)

cd "$(dirname "$0")/../.."
torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_mamba.py \
    "${MODEL_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" \
    ${MORE[@]+"${MORE[@]}"}
