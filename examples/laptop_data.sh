# Sourced by the laptop twins: a corpus every machine has, a vocabulary trained on it, and token files.
#
# Needs an environment with this project installed (PYTHON=... to name its interpreter). Reads RUN_DIR; the functions write
# there, once. PYTHON and RUN_DIR may be set by the caller.
PYTHON=${PYTHON:-python}
MEGABYTES=${MEGABYTES:-1}   # of text; more takes longer and trains better
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

step() { printf '\n=== %s\n' "$*"; }

# For BERT and T5: WordPiece, documents cut into sentences. NLTK's model of sentence ends, the default splitter, has to be
# downloaded; the built-in rule needs nothing.
wordpiece_data() {
    mkdir -p "$RUN_DIR"
    step "corpus: the docstrings of Python's standard library"
    [ -f "$RUN_DIR/prose.jsonl" ] || "$PYTHON" "$ROOT/examples/docstrings.py" "$RUN_DIR/prose.jsonl" "$MEGABYTES"
    step "vocabulary and token files"
    [ -f "$RUN_DIR/vocab.txt" ] || "$PYTHON" "$ROOT/tools/train_tokenizer.py" --model wordpiece --vocab-size 2000 \
        --input "$RUN_DIR/prose.jsonl" --output-dir "$RUN_DIR"
    [ -f "$RUN_DIR/prose_text_sentence.idx" ] || "$PYTHON" "$ROOT/tools/preprocess_data.py" \
        --input "$RUN_DIR/prose.jsonl" --output-prefix "$RUN_DIR/prose" --vocab-file "$RUN_DIR/vocab.txt" \
        --tokenizer-type BertWordPieceLowerCase --split-sentences --sentence-splitter simple --workers 1
}

# For GPT: byte-level BPE, each document ended by the end-of-document token.
bpe_data() {
    mkdir -p "$RUN_DIR"
    step "corpus: the sources of Python's standard library"
    [ -f "$RUN_DIR/corpus.jsonl" ] || "$PYTHON" "$ROOT/examples/first_light/corpus.py" "$RUN_DIR/corpus.jsonl" "$MEGABYTES"
    step "vocabulary and token files"
    [ -f "$RUN_DIR/vocab.json" ] || "$PYTHON" "$ROOT/tools/train_tokenizer.py" --model bpe --vocab-size 2000 \
        --input "$RUN_DIR/corpus.jsonl" --output-dir "$RUN_DIR"
    [ -f "$RUN_DIR/corpus_text_document.idx" ] || "$PYTHON" "$ROOT/tools/preprocess_data.py" \
        --input "$RUN_DIR/corpus.jsonl" --output-prefix "$RUN_DIR/corpus" --vocab-file "$RUN_DIR/vocab.json" \
        --merge-file "$RUN_DIR/merges.txt" --tokenizer-type GPT2BPETokenizer --append-eod --workers 1
}

# train PROCESSES SCRIPT FLAGS...: as torchrun does on a cluster, but over gloo.
train() {
    local processes=$1 script=$2
    shift 2
    step "train: $script on $processes processes"
    "$PYTHON" -m torch.distributed.run --nproc-per-node "$processes" --master-port "${MASTER_PORT:-29512}" \
        "$ROOT/$script" --distributed-backend gloo --num-workers 0 --save "$RUN_DIR/checkpoints" \
        --data-cache-path "$RUN_DIR/cache" --tensorboard-dir "$RUN_DIR/tensorboard" "$@"
}
