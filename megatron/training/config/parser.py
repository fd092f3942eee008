"""From flag declarations to argparse, and from a command line to a Namespace."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn

from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.errors import FlagError
from megatron.core.flags import Flag, flags_of
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import cli
from megatron.training.config import (
    checkpoint,
    data,
    distributed,
    extras,
    inference,
    learning_rate,
    logging,
    network,
    research,
    tokenizer,
    training,
    validation,
)

ALL_CONFIGS: tuple[type, ...] = (
    TransformerConfig,
    network.NetworkConfig,
    network.InitializationConfig,
    network.MixedPrecisionConfig,
    network.TransformerEngineConfig,
    training.TrainingConfig,
    training.ProfilingConfig,
    training.CommandLineConfig,
    OptimizerConfig,
    learning_rate.LearningRateConfig,
    learning_rate.WeightDecayConfig,
    checkpoint.CheckpointConfig,
    distributed.DistributedConfig,
    DistributedDataParallelConfig,
    data.DataConfig,
    tokenizer.TokenizerConfig,
    validation.ValidationConfig,
    logging.LoggingConfig,
    inference.InferenceConfig,
    extras.ExtrasConfig,
    research.RetrievalConfig,
    research.VisionConfig,
    research.RetroConfig,
    research.HybridConfig,
    research.ClusterServicesConfig,
)

#: Groups in the order of `--help` and of the flag reference.
GROUPS: dict[str, str] = {
    "network size": "The shape of the model.",
    "training": "Batches, length, recomputation, fusions, profiling.",
    "learning rate": "Learning rate and its schedule.",
    "regularization": "Dropout, weight decay, clipping, optimizer constants.",
    "mixed precision": "Number formats and loss scaling.",
    "initialization": "Seeds and initial weights.",
    "data and dataloader": "Datasets, tokenizer, loading.",
    "validation": "Evaluation.",
    "checkpointing": "Saving, loading, converting.",
    "distributed": "Division over ranks, communication and its overlap.",
    "moe": "Mixture of experts.",
    "logging": "The log line, TensorBoard, Weights & Biases, timers.",
    "inference": "Text generation.",
    "Transformer-Engine": "Transformer Engine and fp8.",
    "experimental": "Layer specifications and YAML.",
    "extras": "Flags that v0.9 does not have.",
    "config logger": "Records of constructor arguments.",
    "one logger": "Accepted; without effect.",
    "autoresume": "Not supported.",
    "biencoder": "Not supported.",
    "vision": "Not supported.",
    "straggler": "Which ranks are slow.",
    "retro": "Not supported.",
    "ft_package": "Not supported.",
}

#: Spellings of older scripts: the present one, or None for a flag that is dropped together with its value.
OLD_SPELLINGS: dict[str, str | None] = {
    "--local_rank": "--local-rank",
    "--vocab": "--vocab-file",
    "--merges-file": "--merge-file",
    "--data-impl": None,
    "--dataset-impl": None,
    "--DDP-impl": None,
    "--chunk-size": None,
    "--json-key": None,
}

_VALUE_NAMES: dict[Any, str] = {int: "INT", float: "FLOAT"}


def all_flags() -> list[Flag]:
    """Every declared flag, in the order of declaration."""
    return [flag for config_class in ALL_CONFIGS for flag in flags_of(config_class)]


@cache
def by_spelling() -> dict[str, Flag]:
    """Every declared flag, under each of its spellings."""
    return {spelling: flag for flag in all_flags() for spelling in flag.spellings}


def explanation(flag: Flag) -> str:
    """Why a flag has the status it has, and what to give instead."""
    return f"{flag.reason}; use {flag.instead}" if flag.instead else str(flag.reason)


def describe(flag: Flag) -> str:
    """A flag's help with its default and status, as `--help` prints it."""
    notes = []
    if flag.action == "store" and flag.cli_default not in (None, "", []):
        shown = flag.cli_default
        notes.append(f"default: {' '.join(map(str, shown)) if isinstance(shown, list) else shown}")
    if flag.status == "gpu":
        notes.append("GPU only")
    elif flag.status == "noop":
        notes.append(f"no effect: {explanation(flag)}")
    elif flag.status != "stable":
        notes.append(f"{flag.status}: {explanation(flag)}")
    if flag.needs:
        notes.append(f"needs {' and '.join(flag.needs)}")
    if flag.unless:
        notes.append(f"no effect beside {' or '.join(flag.unless)}")
    return f"{flag.help} ({'; '.join(notes)})" if notes else flag.help


def value_name(flag: Flag) -> str:
    """What `--help` shows for a flag's value: its choices, or its type."""
    if flag.choices:
        return "{" + ",".join(str(choice) for choice in flag.choices if choice is not None) + "}"
    return _VALUE_NAMES.get(flag.parse, "TEXT")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=42, width=110)


class Parser(argparse.ArgumentParser):
    """argparse with our error form; `error` ends the process with status 2 as argparse's own does."""

    def error(self, message: str) -> NoReturn:
        """Report a value that does not parse as `<flag>: <why>. Fix: <fix>.`"""
        match = re.match(r"argument ([^:]+): (.*)", message, re.DOTALL)
        subject, why = (match[1].replace("/", ", "), match[2]) if match else ("command line", message)
        cli.stop(FlagError(subject, why, "see --help or docs/flags.md"))


def add_flag(group: Any, flag: Flag) -> None:
    """Add one declared flag to an argparse group."""
    options: dict[str, Any] = {
        "dest": flag.dest,
        "action": flag.action,
        "help": describe(flag).replace("%", "%%"),
    }
    options["default"] = list(flag.cli_default) if isinstance(flag.cli_default, list) else flag.cli_default
    if flag.action == "store":
        options.update(type=flag.parse, nargs=flag.nargs, choices=flag.choices)
        if flag.choices:
            options["metavar"] = (
                "{" + ",".join(str(choice) for choice in flag.choices if choice is not None) + "}"
            )
    group.add_argument(*flag.spellings, **options)


def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every declared flag to `parser`, group by group, and return it."""
    groups = {title: parser.add_argument_group(title, text) for title, text in GROUPS.items()}
    for flag in all_flags():
        add_flag(groups[flag.group], flag)
    parser.set_defaults(local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    return parser


def build(extra_args_provider: Callable[[Any], Any] | None = None) -> argparse.ArgumentParser:
    """The parser of the entry points, with a caller's own flags if it has any."""
    parser: argparse.ArgumentParser = Parser(
        usage="%(prog)s [flags]",
        description="Flags keep the names of Megatron-LM core v0.9. docs/flags.md is the same list with links.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    add_megatron_arguments(parser)
    return parser if extra_args_provider is None else extra_args_provider(parser)


def modernise(argv: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replace old spellings that `known` lacks; returns the new command line and one notice for each."""
    result: list[str] = []
    notices: list[str] = []
    position = 0
    while position < len(argv):
        name, equals, value = argv[position].partition("=")
        position += 1
        if name not in OLD_SPELLINGS or name in known:
            result.append(argv[position - 1])
            continue
        present = OLD_SPELLINGS[name]
        if present is not None:
            notices.append(f"{name} is an old spelling of {present}")
            result.append(present + equals + value)
            continue
        notices.append(f"{name} is not needed any more and was dropped")
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            position += 1
    return result, notices


def unknown(leftover: Sequence[str], known: Sequence[str]) -> FlagError:
    """The error for words that no flag takes, with the nearest flags for those that look like one."""
    names = [word.partition("=")[0] for word in leftover if word.startswith("-")]
    if not names:
        return FlagError(" ".join(leftover), "no flag takes this value", "remove it, or name its flag")
    guesses = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.6) for name in names}
    hints = [f"{guess[0]} instead of {name}" for name, guess in guesses.items() if guess]
    fix = f"did you mean {', '.join(hints)}?" if hints else "see --help or docs/flags.md"
    return FlagError(", ".join(names), "no such flag" if len(names) == 1 else "no such flags", fix)


def parse(
    argv: Sequence[str] | None = None,
    extra_args_provider: Callable[[Any], Any] | None = None,
    ignore_unknown_args: bool = False,
) -> argparse.Namespace:
    """Parse a command line (default: this process's).

    Beside v0.9's attributes the result has `args_given`, the sorted dests that were typed, and `notices`, lines for
    the start-up report. Rank and world size come from the launcher's variables RANK and WORLD_SIZE.
    """
    parser = build(extra_args_provider)
    known = parser._option_string_actions
    words, notices = modernise(sys.argv[1:] if argv is None else argv, list(known))
    args, leftover = parser.parse_known_args(words)
    if leftover and not ignore_unknown_args:
        cli.stop(unknown(leftover, [name for name in known if name.startswith("--")]))
    typed = (word.partition("=")[0] for word in words)
    args.args_given = sorted({known[name].dest for name in typed if name in known})
    args.notices = notices
    args.rank = int(os.environ.get("RANK", "0"))
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return args
