"""Train a vocabulary from JSONL: `python tools/train_tokenizer.py --input a.jsonl --vocab-size 32000 --output-dir v`."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron.training.preprocessing.vocabulary import main

if __name__ == "__main__":
    sys.exit(main())
