"""The older address of a name."""

from megatron.legacy.model import T5Model

__all__ = ["T5Model"]
