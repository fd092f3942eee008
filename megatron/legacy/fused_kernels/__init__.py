"""Kernels that v0.9 compiles at start; converters' plug-ins ask for them."""

from typing import Any


def load(args: Any) -> None:
    """Nothing is to be compiled ahead here, whatever `args` say."""
