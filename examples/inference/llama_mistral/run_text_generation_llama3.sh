#!/usr/bin/env bash
# Serve Llama 3 8B on one GPU, from weights converted to this project's form.
#
#   bash examples/inference/llama_mistral/run_text_generation_llama3.sh CHECKPOINT TOKENIZER [flags]
#
# TOKENIZER is a directory with HuggingFace's files of the tokenizer, or a hub name. huggingface_reference.py beside this
# file continues the same prompt with the published model.
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NVTE_APPLY_QK_LAYER_SCALING=0

MASTER_PORT=${MASTER_PORT:-6000}
CHECKPOINT=${1:?is the directory of the checkpoint}
TOKENIZER=${2:?is the directory or the hub name of the tokenizer}

DISTRIBUTED_ARGS=(
    --nproc_per_node 1
    --nnodes 1
    --node_rank 0
    --master_addr localhost
    --master_port "$MASTER_PORT"
)

MODEL_ARGS=(
    --use-checkpoint-args
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TOKENIZER"
    --transformer-impl transformer_engine
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --seq-length 8192
    --max-position-embeddings 8192
    --position-embedding-type rope
    --use-rotary-position-embeddings
    --rotary-percent 1.0
    --rotary-base 500000
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --attention-softmax-in-fp32
    --no-masked-softmax-fusion
    --seed 42
)

cd "$(dirname "$0")/../../.."
torchrun "${DISTRIBUTED_ARGS[@]}" tools/run_text_generation_server.py \
    --tensor-model-parallel-size 1 \
    --pipeline-model-parallel-size 1 \
    --bf16 \
    --micro-batch-size 1 \
    --load "$CHECKPOINT" \
    "${MODEL_ARGS[@]}" \
    "${@:3}"
