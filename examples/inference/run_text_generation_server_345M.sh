#!/usr/bin/env bash
# Serve a GPT of 345M parameters on one GPU.
#
#   CHECKPOINT=DIR VOCAB_FILE=gpt2-vocab.json MERGE_FILE=gpt2-merges.txt \
#       bash examples/inference/run_text_generation_server_345M.sh [flags]
#
# Then, from anywhere:
#
#   python tools/text_generation_cli.py localhost:5000
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1

RANKS=${RANKS:-1}
MASTER_PORT=${MASTER_PORT:-6000}
CHECKPOINT=${CHECKPOINT:?is the directory of the checkpoint}
VOCAB_FILE=${VOCAB_FILE:?is gpt2-vocab.json}
MERGE_FILE=${MERGE_FILE:?is gpt2-merges.txt}

DISTRIBUTED_ARGS=(
    --nproc_per_node "$RANKS"
    --nnodes 1
    --node_rank 0
    --master_addr localhost
    --master_port "$MASTER_PORT"
)

cd "$(dirname "$0")/../.."
torchrun "${DISTRIBUTED_ARGS[@]}" tools/run_text_generation_server.py \
    --tensor-model-parallel-size "$RANKS" \
    --pipeline-model-parallel-size 1 \
    --num-layers 24 \
    --hidden-size 1024 \
    --num-attention-heads 16 \
    --max-position-embeddings 1024 \
    --seq-length 1024 \
    --tokenizer-type GPT2BPETokenizer \
    --vocab-file "$VOCAB_FILE" \
    --merge-file "$MERGE_FILE" \
    --fp16 \
    --micro-batch-size 1 \
    --load "$CHECKPOINT" \
    --seed 42 \
    "$@"
