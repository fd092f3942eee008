"""The first generation's layout: the one Megatron loader reads every age."""

from tools.checkpoint.loader_mcore import add_arguments, load_checkpoint, verification_model

__all__ = ["add_arguments", "load_checkpoint", "verification_model"]
