#!/usr/bin/env python3
"""Cut a hybrid model's torch-format checkpoint for other tensor- and pipeline-parallel sizes.

`hybrid_conversion.py --load-dir A --save-dir B --target-tp-size 2 --target-pp-size 1 --d-model 1024`. A torch_dist
checkpoint needs no conversion: any layout loads it.
"""

import sys
from pathlib import Path

# This directory goes last: inspect.py in it would hide the standard library's module of its name.
sys.path.append(sys.path.pop(0))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from tools.checkpoint.hybrid_layout import main

    sys.exit(main())
