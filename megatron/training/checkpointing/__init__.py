"""Saving and loading a training run, in the torch and the torch_dist format."""

from megatron.training.checkpointing.arguments import check_checkpoint_args
from megatron.training.checkpointing.layout import (
    CheckpointType,
    checkpoint_exists,
    ensure_directory_exists,
    find_checkpoint_rank_0,
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
    get_distributed_optimizer_checkpoint_name,
    read_metadata,
)
from megatron.training.checkpointing.load import load_args_from_checkpoint, load_checkpoint
from megatron.training.checkpointing.save import (
    cleanup_old_non_persistent_checkpoint,
    save_checkpoint,
    save_dataloader_state,
)
from megatron.training.checkpointing.state import generate_state_dict, get_rng_state

__all__ = [
    "CheckpointType",
    "check_checkpoint_args",
    "checkpoint_exists",
    "cleanup_old_non_persistent_checkpoint",
    "ensure_directory_exists",
    "find_checkpoint_rank_0",
    "generate_state_dict",
    "get_checkpoint_name",
    "get_checkpoint_tracker_filename",
    "get_distributed_optimizer_checkpoint_name",
    "get_rng_state",
    "load_args_from_checkpoint",
    "load_checkpoint",
    "read_metadata",
    "save_checkpoint",
    "save_dataloader_state",
]
