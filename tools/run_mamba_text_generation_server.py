#!/usr/bin/env python3
"""Serve a Mamba or hybrid model over HTTP: run_text_generation_server.py for models of pretrain_mamba.py."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron.training.cli import run_main
from pretrain_mamba import model_provider
from tools.run_text_generation_server import serve


def main() -> None:
    """Serve what pretrain_mamba.py trains."""
    serve(model_provider)


if __name__ == "__main__":
    run_main(main)
