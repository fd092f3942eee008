#!/usr/bin/env python3
"""Convert checkpoints: `convert.py --model-type GPT --loader mcore --saver mcore --load-dir A --save-dir B`.

A loader and a saver are modules `loader_<name>` and `saver_<name>`, here or anywhere on the Python path. A loader has
`add_arguments(parser)` and `load_checkpoint(queue, args)`, a saver the same and `save_checkpoint(queue, args)`. They
run side by side and talk through a bounded queue, so that memory stays at a few layers: a metadata namespace, then
dicts with a `name` and whole CPU tensors (`embeddings`, `transformer layer <n>`, `final norm`, `output layer`,
`pooler`, `lm head`, `binary head`), then the string "done", or "exit" after a failure.
"""

import sys
from pathlib import Path

# This directory goes last: inspect.py in it would hide the standard library's module of its name.
sys.path.append(sys.path.pop(0))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from tools.checkpoint.conversion import main

    sys.exit(main())
