#!/usr/bin/env python3
"""Show what is in a checkpoint, or how two differ: `inspect.py DIR [OTHER]`."""

import signal
import sys
from pathlib import Path

# This directory goes last: first on the path, this file would hide the standard library's module of its name.
sys.path.append(sys.path.pop(0))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from tools.checkpoint.inspection import main

    # Piped into a program that stops reading, such as head, end as other programs do.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
