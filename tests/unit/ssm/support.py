"""v0.9's stack at toy sizes."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.transformer.spec_utils import ModuleSpec


def stack_spec(**mixer: Any) -> ModuleSpec:
    """`mamba_stack_spec` with these arguments of the mixer."""
    spec = copy.deepcopy(mamba_stack_spec)
    spec.submodules.mamba_layer.submodules.mixer.params = mixer
    return spec
