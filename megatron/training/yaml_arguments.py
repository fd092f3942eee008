"""Arguments from a YAML file (`--yaml-cfg`); what the command line gives goes before it.

The file holds flags at the top level, and the fields of the transformer's configuration under `language_model` and
`model_parallel`, under their names there or as arguments. `${NAME}` in a text is replaced by an environment variable.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from types import SimpleNamespace
from typing import Any

from megatron.core.errors import FlagError
from megatron.core.flags import Flag, Runtime, kinds
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.config import build
from megatron.training.config.parser import all_flags

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_ACTIVATIONS: dict[str, dict[str, bool]] = {
    "gelu": {},
    "swiglu": {"swiglu": True},
    "silu": {"swiglu": True},
    "squaredrelu": {"squared_relu": True},
    "squared_relu": {"squared_relu": True},
}
#: Names of an earlier release, which v0.9's sample file keeps.
_FORMER = {"delay_grad_reduce": "align_grad_reduce", "delay_param_gather": "align_param_gather"}


def _error(why: str, fix: str) -> FlagError:
    return FlagError("--yaml-cfg", why, fix)


def _substitute(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _substitute(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item) for item in value]
    if not isinstance(value, str):
        return value
    for name in _VARIABLE.findall(value):
        if name not in os.environ:
            raise _error(f"the environment variable {name} is not set", f"export {name}, or write its value")
    return _VARIABLE.sub(lambda match: os.environ[match[1]], value)


def read_mapping(flag: str, path: str) -> dict[str, Any]:
    """The names with values of the YAML file that `flag` names; FlagError if it is missing or malformed."""
    try:
        import yaml
    except ImportError as missing:
        raise FlagError(flag, "reading YAML needs the package pyyaml", "pip install pyyaml") from missing
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except OSError as reason:
        raise FlagError(flag, f"{path} cannot be read ({reason.strerror})", "check the path") from reason
    except (yaml.YAMLError, UnicodeDecodeError) as reason:
        raise FlagError(flag, f"{path} is not YAML ({reason})", "mend the file") from reason
    if not isinstance(tree, dict):
        raise FlagError(flag, f"{path} holds no names with values", "write lines of the form name: value")
    return tree


def load_yaml(yaml_path: str) -> SimpleNamespace:
    """Read a YAML file into namespaces, one inside the other; FlagError if it is missing or malformed."""
    tree = read_mapping("--yaml-cfg", yaml_path)
    nested = {
        key: SimpleNamespace(**item) if isinstance(item, dict) else item
        for key, item in _substitute(tree).items()
    }
    return SimpleNamespace(**nested)


def _flatten(tree: SimpleNamespace) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in vars(tree).items():
        flat.update(vars(value) if isinstance(value, SimpleNamespace) else {name: value})
    return flat


def _convert(flag: Flag, value: Any) -> Any:
    """The value as the command line would give it: YAML reads 1e-5 as text and 1 as an integer."""
    try:
        if flag.nargs is not None:
            words = value.split() if isinstance(value, str) else value
            items = words if isinstance(words, list) else [words]
            return [flag.parse(item) if flag.parse is not None else str(item) for item in items]
        if flag.action != "store":
            if not isinstance(value, bool):
                raise ValueError("neither true nor false")
            return value
        converted = value if flag.parse is None else flag.parse(value)
    except (TypeError, ValueError) as reason:
        raise _error(
            f"{flag.dest} cannot be {value!r} ({reason})", "write a value the flag would take"
        ) from reason
    if flag.choices is not None and converted not in flag.choices:
        raise _error(f"{flag.dest} cannot be {value!r}", f"choose from {', '.join(map(str, flag.choices))}")
    return converted


def overlay(args: argparse.Namespace, tree: SimpleNamespace) -> None:
    """Store the values of a YAML file in `args` wherever the command line did not give one.

    Nothing (null) leaves a flag at its default. Unknown names are errors.
    """
    flags = {flag.dest: flag for flag in all_flags()}
    fields = kinds(TransformerConfig)
    given = set(args.args_given)
    for written, value in _flatten(tree).items():
        name = _FORMER.get(written, written)
        field = fields.get(name)
        for dest, item in _arguments(name, value).items():
            flag = flags.get(dest)
            if flag is None:
                if item is None or isinstance(field, Runtime) or hasattr(args, dest):
                    continue
                if field is None:
                    nearest = difflib.get_close_matches(name, [*flags, *fields], n=1)
                    hint = (
                        f"did you mean {nearest[0]}?"
                        if nearest
                        else "remove it; docs/flags.md lists all names"
                    )
                    raise _error(f"{args.yaml_cfg}: there is no {name}", hint)
                setattr(args, dest, item)
            elif item is not None and dest not in given:
                setattr(args, dest, _convert(flag, item))


def _arguments(name: str, value: Any) -> dict[str, Any]:
    """The arguments that one name of the file stands for."""
    if name == "activation_func" and value is not None:
        if value not in _ACTIVATIONS:
            raise _error(f"there is no activation_func {value!r}", f"choose from {', '.join(_ACTIVATIONS)}")
        return dict(_ACTIVATIONS[value])
    if name == "bias_activation_fusion" and value is not None:
        return {"bias_gelu_fusion": value, "bias_swiglu_fusion": value}
    if name == "num_query_groups":
        return {} if value is None else {"num_query_groups": value, "group_query_attention": True}
    field = kinds(TransformerConfig).get(name)
    if isinstance(field, Flag):
        return {field.dest: not value if field.inverted and value is not None else value}
    return {name: value}


def core_transformer_config_from_yaml(
    args: argparse.Namespace, transfomer_key: str = "language_model"
) -> TransformerConfig:
    """The transformer's configuration; the file's values are in `args` already, whatever their section."""
    return build.transformer_config(args)
