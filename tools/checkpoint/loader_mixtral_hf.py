"""The classic name of the HuggingFace loader for Mixtral."""

from tools.checkpoint.loader_hf import add_arguments, load_checkpoint, verification_model

__all__ = ["add_arguments", "load_checkpoint", "verification_model"]
