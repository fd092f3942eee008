"""The command line, under v0.9's names: parse, validate, turn into configurations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import yaml_arguments
from megatron.training.config import build, finalize, parser, rules
from megatron.training.config.parser import add_megatron_arguments

__all__ = [
    "add_megatron_arguments", "core_transformer_config_from_args", "notices", "parse_args", "validate_args",
    "validate_for_training",
]  # fmt: skip

#: Attributes that are about the command line itself and not printed with the arguments.
_OWN_RECORDS = ("args_given", "notices")


def parse_args(
    extra_args_provider: Callable[[Any], Any] | None = None,
    ignore_unknown_args: bool = False,
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Parse the command line (`argv`, or this process's), with values of `--yaml-cfg` beneath it.

    `extra_args_provider(parser)` adds flags of its own and returns the parser. A command line that does not parse
    ends the process with status 2.
    """
    args = parser.parse(argv, extra_args_provider, ignore_unknown_args)
    if args.yaml_cfg is not None:
        yaml_arguments.overlay(args, yaml_arguments.load_yaml(args.yaml_cfg))
    return args


def validate_args(args: argparse.Namespace, defaults: dict[str, Any] | None = None) -> argparse.Namespace:
    """Check what was given, derive what follows from it, check the result; prints the arguments on rank 0.

    `defaults` fill arguments that are None. Raises FlagError. The configurations' own rules are checked when they are
    built (`config.build.configs`).
    """
    args.args_given = getattr(args, "args_given", [])
    args.notices = getattr(args, "notices", [])
    before = dict(vars(args))
    args.notices += finalize.overlay_defaults(args, defaults or {})
    rules.check_supported(args)
    rules.check(args, rules.GIVEN)
    args.notices += finalize.run(args)
    rules.check(args, rules.DERIVED)
    if args.rank == 0:
        if args.print_config:
            _print_origins(args, before)
        else:
            _print_args("arguments", args)
    if args.print_config:
        sys.exit(0)
    return args


def validate_for_training(args: argparse.Namespace) -> None:
    """Check validated arguments for what training needs besides: its length, a learning rate, data, batch sizes."""
    rules.check(args, rules.TRAINING)


def notices(args: argparse.Namespace) -> list[str]:
    """The lines the start-up report owes the user: values derived or changed, spellings replaced, flags ignored."""
    return [*getattr(args, "notices", []), *rules.ignored_flags(args)]


def core_transformer_config_from_args(
    args: argparse.Namespace, config_class: type[TransformerConfig] | None = None
) -> TransformerConfig:
    """The transformer's configuration, or an instance of a subclass of it; FlagError where values contradict."""
    return build.transformer_config(args, config_class or TransformerConfig)


def _shown(args: argparse.Namespace) -> list[str]:
    return sorted((name for name in vars(args) if name not in _OWN_RECORDS), key=str.lower)


def _print_args(title: str, args: argparse.Namespace) -> None:
    """Print every argument the way v0.9 does: name, dots up to column 50, value."""
    lines = (f"  {name} {'.' * (48 - len(name))} {getattr(args, name)}" for name in _shown(args))
    head, end = f"{'-' * 24} {title} {'-' * 24}", f"{'-' * 20} end of {title} {'-' * 21}"
    print("\n".join((head, *lines, end)), flush=True)


def _print_origins(args: argparse.Namespace, before: dict[str, Any]) -> None:
    """Print every argument with where its value comes from."""
    given = set(args.args_given)
    defaults = {flag.dest: flag.cli_default for flag in parser.all_flags()}
    for name in _shown(args):
        value = getattr(args, name)
        if name not in before or before[name] != value:
            origin = "derived"
        elif name in given:
            origin = "command line"
        elif name in defaults and defaults[name] != value:
            origin = "YAML or environment"
        else:
            origin = "default"
        print(f"{name} = {value!r}  # {origin}", flush=True)
