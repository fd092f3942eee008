#!/bin/bash
# Encode a corpus with one Slurm array task per shard, then merge.
#
#   SHARDS=64 CPUS=16 bash examples/preprocessing/slurm_array.sh --input 'corpus/*.jsonl.gz' --output-prefix data/corpus \
#       --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --append-eod --workers 16
#
# With --local as the first argument the shards run one after the other on this machine. A task that was preempted
# continues where it stopped: --resume is always given. Partition, account and time limit: SBATCH_ARGS="-p cpu -t 4:00:00".
set -euo pipefail

SHARDS=${SHARDS:-16}
CPUS=${CPUS:-8}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
TOOL=(python "$ROOT/tools/preprocess_data.py")

if [[ ${1:-} == --local ]]; then
    shift
    for ((i = 0; i < SHARDS; i++)); do
        "${TOOL[@]}" "$@" --shard "$i/$SHARDS" --resume
    done
    "${TOOL[@]}" "$@" --merge-shards "$SHARDS"
    exit
fi

COMMAND=$(printf '%q ' "${TOOL[@]}" "$@")
# shellcheck disable=SC2086 # SBATCH_ARGS is a list of options
JOB=$(sbatch --parsable ${SBATCH_ARGS:-} --requeue --cpus-per-task "$CPUS" --array "0-$((SHARDS - 1))" \
    --wrap "$COMMAND --shard \$SLURM_ARRAY_TASK_ID/$SHARDS --resume")
# shellcheck disable=SC2086
sbatch ${SBATCH_ARGS:-} --dependency "afterok:$JOB" --cpus-per-task 1 --wrap "$COMMAND --merge-shards $SHARDS"
