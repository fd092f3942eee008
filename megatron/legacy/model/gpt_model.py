"""The older address of a name."""

from megatron.legacy.model import GPTModel

__all__ = ["GPTModel"]
