"""Which layer of a hybrid stack is of which kind: Mamba, attention or MLP, spread evenly over the depth."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from megatron.core.errors import InvariantError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)


class Symbols:
    """One letter per kind of layer, as in `--hybrid-override-pattern`."""

    MAMBA = "M"
    ATTENTION = "*"
    MLP = "-"
    VALID = frozenset((MAMBA, ATTENTION, MLP))


_NAMES = {Symbols.MAMBA: "Mamba", Symbols.ATTENTION: "attention", Symbols.MLP: "MLP"}


def allocate_layers(
    total_layers_count: int,
    target_attention_ratio: float,
    target_mlp_ratio: float,
    override_pattern: str | None = None,
) -> list[str]:
    """`layer_kinds`, and say on rank 0 what was chosen, unless all layers are Mamba's by default."""
    wanted = (total_layers_count, target_attention_ratio, target_mlp_ratio)
    layers = layer_kinds(*wanted, override_pattern)
    if override_pattern is not None:
        automatic = layer_kinds(*wanted)
        if layers == automatic:
            _log("The override pattern is the pattern the ratios give")
        else:
            _log(f"The override pattern takes the place of {''.join(automatic)}")
    if target_attention_ratio > 0 or target_mlp_ratio > 0 or override_pattern is not None:
        _report(layers, target_attention_ratio, target_mlp_ratio)
    return layers


def layer_kinds(
    total_layers_count: int,
    target_attention_ratio: float,
    target_mlp_ratio: float,
    override_pattern: str | None = None,
) -> list[str]:
    """The kind of each layer, first to last, as letters of `Symbols` (spec: tools, section 4).

    Ratios are shares of all layers, 0 to 1 and together at most 1; halves of a layer are rounded to the even number.
    `override_pattern` gives the letters itself; where a ratio is above zero too, it must have as many of each kind.
    InvariantError (a ValueError) for ratios and patterns that cannot be.
    """
    _check_ratios(total_layers_count, target_attention_ratio, target_mlp_ratio)
    layers = _spread_mlp(_spread_attention(total_layers_count, target_attention_ratio), target_mlp_ratio)
    if override_pattern is None:
        return layers
    with_ratios = target_attention_ratio > 0 or target_mlp_ratio > 0
    return _overridden(override_pattern, total_layers_count, layers if with_ratios else None)


def _check_ratios(layers: int, attention: float, mlp: float) -> None:
    if layers < 1:
        raise InvariantError("--num-layers", f"a stack of {layers} layers is none", "give one layer or more")
    for flag, ratio in (("--hybrid-attention-ratio", attention), ("--hybrid-mlp-ratio", mlp)):
        if not 0 <= ratio <= 1:
            raise InvariantError(flag, f"{ratio} is not a share of the layers", "give a value from 0 to 1")
    if attention + mlp > 1:
        raise InvariantError(
            "--hybrid-attention-ratio, --hybrid-mlp-ratio",
            f"{attention} and {mlp} together are more than all layers",
            "lower one of the two",
        )


def _spread_attention(count: int, ratio: float) -> list[str]:
    """Attention layers between equally long runs of Mamba layers."""
    wanted = round(count * ratio)
    run = (count - wanted) / (wanted + 1)
    layers, left = [], run
    for _ in range(count):
        if left < 0.5:
            layers.append(Symbols.ATTENTION)
            left += run
        else:
            layers.append(Symbols.MAMBA)
            left -= 1
    return layers


def _spread_mlp(layers: list[str], ratio: float) -> list[str]:
    """The same with MLP layers in place of Mamba layers, each after an equally long run of those that remain."""
    wanted = round(len(layers) * ratio)
    if wanted == 0:
        return layers
    run = (layers.count(Symbols.MAMBA) - wanted) / wanted
    spread, left = [], run
    for layer in layers:
        if layer == Symbols.MAMBA and left < 0.5:
            layer = Symbols.MLP
            left += run
        elif layer == Symbols.MAMBA:
            left -= 1
        spread.append(layer)
    return spread


def _overridden(pattern: str, count: int, automatic: list[str] | None) -> list[str]:
    """The pattern's letters; InvariantError unless they are `count` known ones, as many of each as in `automatic`."""
    flag, layers = "--hybrid-override-pattern", list(pattern)
    known = " ".join(f"{letter} ({name})" for letter, name in _NAMES.items())
    if strange := set(layers) - Symbols.VALID:
        raise InvariantError(flag, f"{sorted(strange)} in {pattern!r} name no kind of layer", f"use {known}")
    if len(layers) != count:
        raise InvariantError(
            f"{flag}, --num-layers",
            f"{pattern!r} has {len(layers)} letters for {count} layers",
            "give one per layer",
        )
    if automatic is not None and Counter(layers) != Counter(automatic):
        raise InvariantError(
            f"{flag}, --hybrid-attention-ratio, --hybrid-mlp-ratio",
            f"{pattern!r} has {layer_counts(layers)}, and the ratios ask for {layer_counts(automatic)}",
            "drop the ratios, or give a pattern with as many of each kind",
        )
    return layers


def layer_counts(layers: Sequence[str]) -> str:
    """How many layers there are of each kind, in words."""
    return ", ".join(f"{layers.count(letter)} {name}" for letter, name in _NAMES.items())


def _report(layers: list[str], attention: float, mlp: float) -> None:
    legend = ", ".join(f"{letter} is {name}" for letter, name in _NAMES.items())
    _log(f"Hybrid allocation ({legend}): {''.join(layers)}")
    for letter, target in ((Symbols.ATTENTION, attention), (Symbols.MLP, mlp)):
        name, count = _NAMES[letter], layers.count(letter)
        _log(
            f"{count} {name} layers of {len(layers)}. Target {name} ratio: {target:.2f}. "
            f"Actual {name} ratio: {count / len(layers):.2f}."
        )


def _log(message: str) -> None:
    log_single_rank(logger, logging.INFO, message)
