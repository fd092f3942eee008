"""A checkpoint's arguments against the run's: what must agree, what may differ, what is taken over."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.core.errors import CheckpointError
from megatron.training.checkpointing.state import current_args, say

_ABSENT = object()


class IncompatibleCheckpointError(CheckpointError):
    """A good checkpoint that does not belong to this run."""


class OtherLayoutError(IncompatibleCheckpointError, RuntimeError):
    """A good checkpoint that only its own layout can load; v0.9 raises a RuntimeError."""


def _names(text: str) -> list[str]:
    return text.split()


_ARCHITECTURE = _names(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention
    num_query_groups max_position_embeddings padded_vocab_size position_embedding_type
    add_position_embedding add_bias_linear add_qkv_bias swiglu normalization apply_layernorm_1p
    qk_layernorm untie_embeddings_and_output_weights num_experts hybrid_attention_ratio hybrid_mlp_ratio
    hybrid_override_pattern
    """
)
_ARITHMETIC = _names(
    """
    rotary_base rotary_percent rotary_interleaved norm_epsilon apply_query_key_layer_scaling
    squared_relu openai_gelu moe_router_topk fp16 bf16 hidden_dropout attention_dropout
    """
)
_LAYOUT = _names(
    """
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    expert_model_parallel_size context_parallel_size data_parallel_size use_distributed_optimizer
    """
)
_SCHEDULE = _names("lr min_lr weight_decay lr_decay_style lr_warmup_iters lr_decay_iters")
_OPTIMIZER = _names("adam_beta1 adam_beta2 adam_eps sgd_momentum")
_TRAINING = _names("clip_grad global_batch_size seq_length tokenizer_type data_parallel_random_init")
_EFFECTS = {
    **dict.fromkeys(_ARCHITECTURE, "yes: another model"),
    **dict.fromkeys(_ARITHMETIC, "yes: same weights, other results"),
    **dict.fromkeys(_LAYOUT, "no: weights and optimizer are cut anew"),
    "moe_grouped_gemm": "for the optimizer in the torch format: its state is of experts in one form",
    "optimizer": "yes: the saved state is another optimizer's",
    **dict.fromkeys(
        _SCHEDULE, "an --override- or --use-checkpoint-opt_param-scheduler flag says which holds"
    ),
    **dict.fromkeys(_OPTIMIZER, "yes: the checkpoint's comes back with the optimizer"),
    **dict.fromkeys(_TRAINING, "yes: training goes on with this run's"),
    "seed": "no: random states come from the checkpoint",
}

# --use-checkpoint-args: taken over always, and only where the command line left None.
_FORCED = _names(
    """
    num_query_groups group_query_attention position_embedding_type add_position_embedding
    use_rotary_position_embeddings rotary_percent rotary_interleaved add_bias_linear add_qkv_bias
    swiglu untie_embeddings_and_output_weights apply_layernorm_1p normalization
    apply_query_key_layer_scaling
    """
)
# Taken over where the checkpoint is a hybrid model's.
_HYBRID = _names("hybrid_attention_ratio hybrid_mlp_ratio hybrid_override_pattern")
_FORCED_LAYOUT = _names(
    """
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    """
)
_IF_UNSET = _names(
    """
    num_layers hidden_size ffn_hidden_size seq_length num_attention_heads kv_channels
    max_position_embeddings tokenizer_type padded_vocab_size
    """
)


def differences(checkpoint_args: Any, args: Namespace) -> list[tuple[str, Any, Any, str]]:
    """(setting, checkpoint's value, run's value, whether that matters) of every setting that is known to and differs."""
    rows = []
    for name, effect in _EFFECTS.items():
        if name == "add_position_embedding" and _rotary(checkpoint_args, args):
            continue
        theirs, ours = getattr(checkpoint_args, name, _ABSENT), getattr(args, name, _ABSENT)
        if theirs is not _ABSENT and ours is not _ABSENT and theirs != ours:
            rows.append((name, theirs, ours, effect))
    return rows


def _rotary(checkpoint_args: Any, args: Namespace) -> bool:
    """Whether both have rotary positions: `add_position_embedding`, which is of learned ones, then says nothing."""
    return {getattr(each, "position_embedding_type", None) for each in (checkpoint_args, args)} == {"rope"}


def difference_table(checkpoint_args: Any, args: Namespace) -> str:
    """The differences as an aligned table; empty if there are none."""
    rows = differences(checkpoint_args, args)
    if not rows:
        return ""
    cells = [("setting", "checkpoint", "this run", "does it matter"), *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in cells)


#: What to give where the flag of a setting is not named like it.
_SET_BY = {"add_position_embedding": "--position-embedding-type"}


def check_checkpoint_args(
    checkpoint_args: Any, *, args: Namespace | None = None, fixed_layout: bool = False, version: float = 3.0
) -> None:
    """Refuse a checkpoint of another model, naming every setting that must agree and does not.

    `fixed_layout` says that the checkpoint's files belong to ranks (torch format), so that the tensor- and
    pipeline-parallel sizes must agree too. What may differ is printed as a table.
    """
    args = current_args(args)
    must = ["num_layers", "hidden_size", "num_attention_heads"]
    if not _rotary(checkpoint_args, args):
        must.append("add_position_embedding")
    if getattr(args, "vocab_file", None):
        must += ["max_position_embeddings", "make_vocab_size_divisible_by", "tokenizer_type"]
        must += ["padded_vocab_size"] if fixed_layout else []
    if getattr(args, "data_parallel_random_init", False):
        must.append("data_parallel_random_init")
    wrong = [
        (name, theirs, getattr(args, name))
        for name in must
        if (theirs := _value(checkpoint_args, name)) is not _ABSENT and theirs != getattr(args, name, theirs)
    ]
    if wrong:
        rows = "; ".join(
            f"{name} value from checkpoint ({theirs}) is not equal to the input argument value ({ours})"
            for name, theirs, ours in wrong
        )
        flags = " ".join(_SET_BY.get(name, f"--{name.replace('_', '-')}") for name, _, _ in wrong)
        fix = f"set {flags} as in the checkpoint, or pass --use-checkpoint-args"
        if getattr(args, "use_checkpoint_args", False):
            fix = f"set {flags} as in the checkpoint, or not at all: --use-checkpoint-args fills in what is not given"
        raise IncompatibleCheckpointError("checkpoint", rows, fix)
    if fixed_layout:
        _check_layout(checkpoint_args, args, version)
    say_differences(checkpoint_args, args)


def say_differences(checkpoint_args: Any, args: Namespace) -> None:
    """Print the table of differences, if there are any."""
    if table := difference_table(checkpoint_args, args):
        say(f"the checkpoint's arguments differ from this run's:\n{table}")


def _value(checkpoint_args: Any, name: str) -> Any:
    default = True if name == "add_position_embedding" else _ABSENT
    return getattr(checkpoint_args, name, default)


def _check_layout(checkpoint_args: Any, args: Namespace, version: float) -> None:
    sizes = {"tensor_model_parallel_size": "tensor_model_parallel_size"}
    if version >= 3.0:
        sizes["pipeline_model_parallel_size"] = "pipeline_model_parallel_size"
    else:
        sizes["tensor_model_parallel_size"] = "model_parallel_size"
    for name, theirs_name in sizes.items():
        theirs, ours = getattr(checkpoint_args, theirs_name, None), getattr(args, name)
        if theirs is not None and theirs != ours:
            why = (
                f"{name} value from checkpoint ({theirs}) is not equal to the input argument value ({ours}), "
                "and files of the torch format belong to ranks"
            )
            flag = f"--{name.replace('_', '-')}"
            raise IncompatibleCheckpointError(
                "checkpoint",
                why,
                f"set {flag} {theirs}, or convert the checkpoint with tools/checkpoint/convert.py",
            )


def apply_checkpoint_args(args: Namespace, checkpoint_args: Any, version: float) -> None:
    """Copy the architecture of a checkpoint into `args` (--use-checkpoint-args), telling what was set."""
    if hasattr(checkpoint_args, "disable_bias_linear"):
        checkpoint_args.add_bias_linear = not checkpoint_args.disable_bias_linear

    def take(name: str, theirs_name: str | None = None, force: bool = False) -> None:
        if not force and getattr(args, name, None) is not None:
            return
        value = getattr(checkpoint_args, theirs_name or name, None)
        if value is None:
            say(f"Checkpoint did not provide arguments {name}")
        else:
            say(f"Setting {name} to {value} from checkpoint")
            setattr(args, name, value)

    for name in _IF_UNSET:
        take(name)
    for name in [*_FORCED, *(name for name in _HYBRID if getattr(checkpoint_args, name, None))]:
        take(name, force=True)
    if version < 3.0:
        take("tensor_model_parallel_size", "model_parallel_size")
    else:
        for name in _FORCED_LAYOUT:
            take(name, force=True)
        take("num_layers_per_virtual_pipeline_stage")
