"""Where rules about several flags are listed, and how they are checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from megatron.core.errors import FlagError
from megatron.core.flags import Flag, Rule
from megatron.core.kernels import capability
from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols, layer_kinds
from megatron.training.cli import MachineError
from megatron.training.config.parser import all_flags, by_spelling, explanation

#: Checked on what was given, before anything is derived from it.
GIVEN: list[Rule] = []
#: Checked on the finished arguments.
DERIVED: list[Rule] = []
#: Checked on the finished arguments of commands that train.
TRAINING: list[Rule] = []
#: Checked on the finished arguments of this project's own entry scripts, whose samples come from files.
FROM_FILES: list[Rule] = []
#: Checked on the finished arguments when the layers of a model that is no encoder-decoder are divided.
ONE_STACK: list[Rule] = []

_OF_MASKING = {"mask_prob", "short_seq_prob"}
_OF_DOCUMENTS = {
    "reset_position_ids",
    "reset_attention_mask",
    "eod_mask_loss",
    "create_attention_mask_in_dataloader",
}
_OF_GENERATION = {"inference_batch_times_seqlen_threshold", "max_tokens_to_oom"}
_OF_PAIRS = {"decoder_num_layers", "decoder_seq_length"}
#: BERT and T5 build their layers without norms of queries and keys, rotate with one base, and read local files.
_OF_GPT = {*_OF_DOCUMENTS, "qk_layernorm", "rotary_base", "s3_cache_path"}
#: By what is trained: arguments that it does not read.
UNREAD: dict[str, frozenset[str]] = {
    "GPT": frozenset({*_OF_MASKING, *_OF_GENERATION, *_OF_PAIRS, "bert_binary_head"}),
    # What their layers are made of stands in --spec.
    "hybrid models": frozenset(
        {*_OF_MASKING, *_OF_GENERATION, *_OF_PAIRS, "bert_binary_head", "transformer_impl"}
    ),
    "BERT": frozenset({*_OF_GPT, *_OF_GENERATION, *_OF_PAIRS}),
    "T5": frozenset({*_OF_GPT, *_OF_GENERATION, "bert_binary_head", "spec"}),
}
_OF_ATTENTION = {
    "attention_dropout",
    "apply_query_key_layer_scaling",
    "attention_softmax_in_fp32",
    "masked_softmax_fusion",
    "group_query_attention",
    "num_query_groups",
    "reset_attention_mask",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_flash_attn",
}
_OF_MLPS = {
    "ffn_hidden_size",
    "swiglu",
    "squared_relu",
    "openai_gelu",
    "bias_gelu_fusion",
    "bias_swiglu_fusion",
}
#: By a kind of layers that a hybrid model may lack: its name, and arguments that no other kind reads.
_OF_LAYERS = {Symbols.ATTENTION: ("attention", _OF_ATTENTION), Symbols.MLP: ("MLP", _OF_MLPS)}


def check(args: Any, rules: Iterable[Rule]) -> None:
    """Raise FlagError for the first of `rules` that `args` break; rules about other kinds of machine are passed over."""
    here = "cuda" if capability.probe().has_cuda else "cpu"
    for candidate in rules:
        if candidate.device in (None, here) and not candidate.holds(args):
            raise candidate.error(args, FlagError if candidate.device is None else MachineError)


def check_supported(args: Any) -> None:
    """Raise FlagError if a flag of something this project does not have is away from its default."""
    for flag in all_flags():
        if flag.status == "unsupported" and getattr(args, flag.dest, flag.cli_default) != flag.cli_default:
            fix = "remove the flag" if flag.instead is None else f"give {flag.instead}"
            raise FlagError(flag.spellings[0], f"not supported: {flag.reason}", fix)


def _given(condition: str, args: Any) -> str | None:
    """Which of the alternatives of a `Flag.needs` or `Flag.unless` holds: the flag has the value named there, or any.

    A number that is 0 is none: it switches off what it is the size of.
    """
    for alternative in condition.split(" or "):
        spelling, _, value = alternative.partition(" ")
        flag = by_spelling()[spelling]
        present = getattr(args, flag.dest, flag.cli_default)
        switched_off = flag.action == "store" and present == 0
        if str(present) == value if value else present != flag.cli_default and not switched_off:
            return alternative
    return None


def _line(flag: Flag, args: Any) -> str | None:
    if flag.status in ("noop", "deprecated"):
        effect = "has no effect" if flag.status == "noop" else "is deprecated"
        return f"{flag.spellings[0]} {effect}: {explanation(flag)}"
    if flag.status == "gpu" and not capability.probe().has_cuda:
        return f"{flag.spellings[0]} has no effect: it needs a CUDA device"
    for condition in flag.needs:
        if _given(condition, args) is None:
            return f"{flag.spellings[0]} has no effect: it needs {condition}"
    for condition in flag.unless:
        if (decisive := _given(condition, args)) is not None:
            return f"{flag.spellings[0]} has no effect beside {decisive}"
    return None


def ignored_flags(args: Any) -> list[str]:
    """One line for each flag the user typed that does nothing here, or has a better name."""
    given = set(getattr(args, "args_given", ()))
    lines = (_line(flag, args) for flag in all_flags() if flag.dest in given)
    return [line for line in lines if line is not None]


def unread_flags(args: Any, reader: str, dests: Collection[str], declared: Iterable[Flag]) -> list[str]:
    """One line for each of the `declared` flags that fills one of `dests`, which `reader` does not read, and was typed."""
    given = set(dests) & set(args.args_given)
    return [f"{flag.spellings[0]} has no effect on {reader}" for flag in declared if flag.dest in given]


def unread_by(model: str | None, args: Any) -> list[str]:
    """The same for the flags that `UNREAD` lists under the name of a model; nothing is known of one without a name."""
    if model is None:
        return []
    lines = unread_flags(args, model, UNREAD[model], all_flags())
    if model == "hybrid models":
        ratios = (args.hybrid_attention_ratio, args.hybrid_mlp_ratio)
        kinds = layer_kinds(args.num_layers, *ratios, args.hybrid_override_pattern)
        for kind, (name, dests) in _OF_LAYERS.items():
            if kind not in kinds:
                lines += unread_flags(args, f"{model} without {name} layers", dests, all_flags())
    return lines
