"""The other name of group_duplicate_url.py."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from group_duplicate_url import main
from loose_json import run

if __name__ == "__main__":
    run(main)
