"""What a configuration field says about itself: inert records of flags, rules and derive steps.

A field of a configuration dataclass is exactly one of four kinds: `flag` declares a command-line flag,
`from_args` reads a value another class declares (or nobody: then it is a library-only setting), `computed`
derives its value from the arguments, `runtime` is filled in while training runs. Nothing here knows argparse;
the library works without a command line, and the shell turns these records into one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar

from megatron.core.errors import ConfigError, FlagError

Status = Literal["stable", "gpu", "deprecated", "noop", "unsupported"]
Action = Literal["store", "store_true", "store_false"]
_Function = TypeVar("_Function", bound=Callable[..., Any])
_KIND = "megatron"
_SAME: Any = object()
_INFER: Any = object()
_PARSERS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": bool}


@dataclass(frozen=True)
class Flag:
    """One command-line flag, as declared on the configuration field it fills.

    `default` is the library's, `cli_default` the command line's (they differ where v0.9's differ). `parse` converts
    the text, None leaves it as it is. `inverted` means that the field holds `not args.<dest>`. `instead` is the flag that
    took this one's place. `needs` are what must be given too for this flag to have an effect, each a flag, with its value
    if one is meant, or several joined by " or "; beside any one of `unless`, spelled alike, it has none.
    """

    field: str
    dest: str
    spellings: tuple[str, ...]
    action: Action
    default: Any
    cli_default: Any
    parse: Callable[[str], Any] | None
    nargs: str | None
    choices: tuple[Any, ...] | None
    group: str
    help: str
    status: Status
    reason: str | None
    instead: str | None
    needs: tuple[str, ...]
    unless: tuple[str, ...]
    inverted: bool


@dataclass(frozen=True)
class FromArgs:
    """The field copies `args.<dest>` where the arguments hold it."""

    dest: str


@dataclass(frozen=True)
class Computed:
    """The field is a function of the finished arguments."""

    compute: Callable[[Any], Any]


@dataclass(frozen=True)
class Runtime:
    """The field is assigned while training runs."""


@dataclass(frozen=True)
class _Declaration:
    """A `flag(...)` before its class, and so its field's name and annotation, is known."""

    options: dict[str, Any]


def _field(default: Any, kind: Any, kw_only: bool = False) -> Any:
    metadata = {_KIND: kind}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata, kw_only=kw_only)
    return field(default=default, metadata=metadata, kw_only=kw_only)


def flag(
    default: Any,
    *,
    group: str,
    help: str,
    cli_default: Any = _SAME,
    on: str | tuple[str, ...] | None = None,
    off: str | None = None,
    dest: str | None = None,
    parse: Any = _INFER,
    nargs: str | None = None,
    choices: tuple[Any, ...] | None = None,
    status: Status = "stable",
    reason: str | None = None,
    instead: str | None = None,
    needs: str | tuple[str, ...] = (),
    unless: str | tuple[str, ...] = (),
    inverted: bool = False,
    kw_only: bool = False,
) -> Any:
    """Declare the command-line flag that fills this field.

    Without `on` or `off` the flag is spelled like the field. `off` names a flag that switches the field off; a field
    annotated `bool` is otherwise switched on, and any other annotation names the type of the flag's value.
    A `status` other than "stable" and "gpu" needs a `reason`, which users read, and may name the flag to give `instead`.
    One that acts only beside others, or only without them, says so (`needs`, `unless`: see `Flag`); its user is told
    where it does nothing.
    """
    options = dict(locals())
    del options["kw_only"]
    return _field(default, _Declaration(options), kw_only)


def from_args(dest: str, default: Any, kw_only: bool = False) -> Any:
    """Read a value that another class declares, or a library-only setting that an extra flag may supply."""
    return _field(default, FromArgs(dest), kw_only)


def computed(default: Any, compute: Callable[[Any], Any]) -> Any:
    """Derive this field from the arguments; `default` is what the library uses."""
    return _field(default, Computed(compute))


def runtime(default: Any) -> Any:
    """This field is filled by the training loop, never by the command line."""
    return _field(default, Runtime())


def _value_type(annotation: str) -> Callable[[str], Any]:
    name = annotation.replace(" | None", "").replace("list[", "").rstrip("]")
    return _PARSERS[name]


def _resolve(name: str, annotation: str, options: dict[str, Any]) -> Flag:
    on, off, parse, cli_default = options["on"], options["off"], options["parse"], options["cli_default"]
    needs, unless = options["needs"], options["unless"]
    spelled = on or off or "--" + name.replace("_", "-")
    action: Action = "store"
    if parse is _INFER:
        if annotation.startswith("bool"):
            action = "store_false" if off and not options["inverted"] else "store_true"
        parse = _value_type(annotation) if action == "store" else None
    if cli_default is _SAME:
        cli_default = options["default"]
    return Flag(
        field=name,
        dest=options["dest"] or name,
        spellings=(spelled,) if isinstance(spelled, str) else tuple(spelled),
        action=action,
        default=options["default"],
        cli_default=(not cli_default) if options["inverted"] else cli_default,
        parse=parse,
        nargs=options["nargs"],
        choices=options["choices"],
        group=options["group"],
        help=options["help"],
        status=options["status"],
        reason=options["reason"],
        instead=options["instead"],
        needs=(needs,) if isinstance(needs, str) else needs,
        unless=(unless,) if isinstance(unless, str) else unless,
        inverted=options["inverted"],
    )


@cache
def kinds(config_class: type) -> dict[str, Flag | FromArgs | Computed | Runtime | None]:
    """What each field of a configuration class is, in field order; None for a field of none of the four kinds."""
    result: dict[str, Flag | FromArgs | Computed | Runtime | None] = {}
    for item in fields(config_class):
        kind = item.metadata.get(_KIND)
        if isinstance(kind, _Declaration):
            kind = _resolve(item.name, str(item.type), kind.options)
        result[item.name] = kind
    return result


def flags_of(config_class: type) -> list[Flag]:
    """The flags a configuration class declares, its base classes' included."""
    return [kind for kind in kinds(config_class).values() if isinstance(kind, Flag)]


@dataclass(frozen=True)
class Rule:
    """A claim about values that must hold together.

    `bad` is a command line (added to a valid one) that breaks the rule. `why` and `fix` may quote values as
    `{a.name}`. A rule with `device` set is about that kind of machine only.
    """

    flags: tuple[str, ...]
    holds: Callable[[Any], bool]
    bad: str
    why: str
    fix: str
    device: Literal["cpu", "cuda"] | None = None

    def error(self, values: Any, kind: type[ConfigError] = FlagError) -> ConfigError:
        """The error to raise when `values` break this rule."""
        return kind(", ".join(self.flags), self.why.format(a=values), self.fix.format(a=values))


class BrokenRule(ConfigError):
    """A configuration object breaks `rule`; the shell reports it in terms of flags."""

    rule: Rule


def rule(
    rules: list[Rule], *flags: str, bad: str, why: str, fix: str, device: Literal["cpu", "cuda"] | None = None
) -> Callable[[_Function], _Function]:
    """Append the decorated predicate to `rules`: it takes the values and returns whether the claim holds."""

    def register(holds: _Function) -> _Function:
        rules.append(Rule(flags, holds, bad, why, fix, device))
        return holds

    return register


def check_config(config: Any, rules: Iterable[Rule]) -> None:
    """Raise for the first of `rules` that a configuration object breaks, naming fields where it has them."""
    spelled = {flag.spellings[0]: flag.field for flag in flags_of(type(config))}
    for candidate in rules:
        if not candidate.holds(config):
            names = ", ".join(spelled.get(name, name) for name in candidate.flags)
            error = BrokenRule(
                f"{type(config).__name__} ({names})",
                candidate.why.format(a=config),
                candidate.fix.format(a=config),
            )
            error.rule = candidate
            raise error


@dataclass(frozen=True)
class Step:
    """A small derivation over the arguments; `reads` and `writes` name the attributes it may touch.

    `run` returns a line for the start-up report, or None.
    """

    name: str
    run: Callable[[Any], str | None]
    reads: frozenset[str]
    writes: frozenset[str]


def step(steps: list[Step], *, reads: str, writes: str) -> Callable[[_Function], _Function]:
    """Append the decorated function to `steps`; the order of the list is the order of execution."""

    def register(run: _Function) -> _Function:
        steps.append(Step(run.__name__, run, frozenset(reads.split()), frozenset(writes.split())))
        return run

    return register
