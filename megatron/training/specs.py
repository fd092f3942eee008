"""Specifications of layers that users name on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.errors import FlagError
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

_EXAMPLES = {
    "layer": "megatron.core.models.bert.bert_layer_specs bert_layer_local_spec",
    "stack": "megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec",
}


def named_spec(words: Sequence[str], *, of_a_stack: bool = False) -> Any:
    """What `--spec MODULE NAME` names: the ModuleSpec of a layer or block, or the layers of a block one by one.

    With `of_a_stack` only a ModuleSpec will do. FlagError for anything else, and for names that cannot be imported.
    """
    try:
        spec = import_module(list(words))
    except ValueError as error:
        fix = "give an importable module and the name of a ModuleSpec in it"
        raise FlagError("--spec", str(error), fix) from error
    wanted, found = "stack" if of_a_stack else "layer", f"a {type(spec).__name__}"
    good = isinstance(spec, ModuleSpec if of_a_stack else (ModuleSpec, TransformerBlockSubmodules))
    if good and of_a_stack and _is_of_a_layer(spec):
        good, found = False, f"the ModuleSpec of a {spec.module.__name__}"
    if not good:
        raise FlagError(
            f"--spec {' '.join(words)}",
            f"it is {found}, no ModuleSpec of a {wanted}",
            f"name one, for instance --spec {_EXAMPLES[wanted]}",
        )
    return spec


def _is_of_a_layer(spec: ModuleSpec) -> bool:
    return isinstance(spec.module, type) and issubclass(spec.module, BaseTransformerLayer)
