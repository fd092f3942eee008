"""Tokenize JSON documents into `.bin` and `.idx` files: `python tools/preprocess_data.py --help`."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron.training.preprocessing.pipeline import main

if __name__ == "__main__":
    sys.exit(main())
