"""The older address of a name."""

from megatron.legacy.model import BertModel

__all__ = ["BertModel"]
