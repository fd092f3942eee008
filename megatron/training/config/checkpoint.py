"""Flags about saving, loading and converting checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.flags import flag

_FORMATS = ("torch", "torch_dist", "zarr")
_STRICTNESS = (
    "assume_ok_unexpected", "log_unexpected", "log_all", "raise_unexpected", "raise_all", "return_unexpected",
    "return_all", "ignore_all",
)  # fmt: skip


@dataclass
class CheckpointConfig:
    """Where checkpoints go and come from, when, and what is in them."""

    # fmt: off
    save: str | None = flag(None, group="checkpointing", help="Directory to save checkpoints into.")
    save_interval: int | None = flag(
        None, on=("--save-interval", "--persistent-save-interval"), group="checkpointing",
        needs="--save", help="Steps between checkpoints.")
    no_save_optim: bool | None = flag(
        None, group="checkpointing", needs="--save or --ckpt-convert-save", help="Save no optimizer state.")
    no_save_rng: bool | None = flag(
        None, group="checkpointing", needs="--save or --ckpt-convert-save", help="Save no random state.")
    load: str | None = flag(None, group="checkpointing", help="Directory to load a checkpoint from.")
    no_load_optim: bool | None = flag(
        None, group="checkpointing", needs="--load or --pretrained-checkpoint", help="Load no optimizer state.")
    no_load_rng: bool | None = flag(
        None, group="checkpointing", needs="--load or --pretrained-checkpoint", help="Load no random state.")
    non_persistent_save_interval: int | None = flag(
        None, group="checkpointing",
        needs="--save or --load", help="Steps between checkpoints of which only the newest is kept.")
    non_persistent_ckpt_type: str | None = flag(
        None, choices=("global", "local", "in_memory", None), group="checkpointing",
        needs="--non-persistent-save-interval or --load",
        help="Kind of those checkpoints: `global`, the only one, is a distributed one on a shared file system. With --load "
        "they are looked for even if none are saved.")
    non_persistent_global_ckpt_dir: str | None = flag(
        None, group="checkpointing",
        needs="--non-persistent-save-interval or --non-persistent-ckpt-type",
        help="Directory for those of kind global; default a folder inside --save.")
    non_persistent_local_ckpt_dir: str | None = flag(
        None, group="checkpointing", status="unsupported", reason="node-local checkpoints do not work in v0.9 either",
        help="Directory for those of kind local.")
    non_persistent_local_ckpt_algo: str = flag(
        "fully_parallel", choices=("fully_parallel", "atomic"), group="checkpointing", status="unsupported",
        reason="node-local checkpoints do not work in v0.9 either", help="How those of kind local are written.")
    finetune: bool = flag(
        False, group="checkpointing",
        needs="--load or --pretrained-checkpoint",
        help="Load weights only: iteration 0, fresh optimizer, schedule and random state.")
    pretrained_checkpoint: str | None = flag(
        None, group="checkpointing", help="Checkpoint whose weights to start from when --load holds none.")
    ckpt_step: int | None = flag(
        None, group="checkpointing", needs="--load", help="Load this iteration instead of the newest.")
    use_checkpoint_args: bool = flag(
        False, group="checkpointing", help="Take the model's shape from the checkpoint; sizes that are given must be its.")
    exit_on_missing_checkpoint: bool = flag(
        False, group="checkpointing",
        needs="--load or --pretrained-checkpoint", help="End if --load holds no checkpoint, instead of starting anew.")
    use_dist_ckpt_deprecated: bool = flag(
        False, on="--use-dist-ckpt", group="checkpointing", status="noop", reason="another flag decides",
        instead="--ckpt-format", help="Old way to choose the distributed format.")
    auto_detect_ckpt_format: bool = flag(
        False, group="checkpointing", status="noop", reason="the format is always found out",
        help="Find out the format of the checkpoint to load by looking at it.")
    dist_ckpt_format_deprecated: str | None = flag(
        None, on="--dist-ckpt-format", parse=None, group="checkpointing", status="noop",
        reason="another flag decides", instead="--ckpt-format", help="Old name of --ckpt-format.")
    ckpt_format: str = flag(
        "torch_dist", parse=None, choices=_FORMATS, group="checkpointing", needs="--save or --load",
        help="Format to save in: one file per model rank (torch), or layout-independent pieces.")
    ckpt_convert_format: str | None = flag(
        None, parse=None, choices=_FORMATS, group="checkpointing",
        help="Load, save in this format under --ckpt-convert-save, and end.")
    ckpt_convert_save: str | None = flag(
        None, parse=None, group="checkpointing",
        needs="--ckpt-convert-format", help="Where a converted checkpoint goes.")
    ckpt_convert_update_legacy_dist_opt_format: bool = flag(
        False, group="checkpointing",
        needs="--ckpt-convert-format", help="While converting, bring old optimizer state to the present format.")
    ckpt_fully_parallel_save_deprecated: bool = flag(
        False, on="--ckpt-fully-parallel-save", group="checkpointing", status="noop", reason="it is the default",
        help="Let all data-parallel ranks write their share.")
    ckpt_fully_parallel_save: bool = flag(
        True, off="--no-ckpt-fully-parallel-save", group="checkpointing",
        needs=("--save or --ckpt-convert-save", "--ckpt-format torch_dist or --ckpt-convert-format torch_dist"),
        help="Let the first data-parallel rank write everything instead of all ranks their share.")
    async_save: bool | None = flag(
        None, group="checkpointing",
        needs="--save or --ckpt-convert-save", help="Write checkpoints while training goes on.")
    ckpt_fully_parallel_load: bool = flag(
        False, group="checkpointing",
        needs="--load or --pretrained-checkpoint", help="Let data-parallel ranks read shares and exchange them.")
    ckpt_assume_constant_structure: bool = flag(
        False, group="checkpointing",
        needs=("--save", "--ckpt-format torch_dist"),
        help="Plan the first save only and reuse the plan: all checkpoints of the run have the same content.")
    dist_ckpt_strictness: str = flag(
        "assume_ok_unexpected", choices=_STRICTNESS, group="checkpointing",
        needs="--load or --pretrained-checkpoint",
        help="What to do about keys that are missing in the checkpoint or unexpected there.")
    # fmt: on
