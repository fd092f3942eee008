"""v0.9's stack at toy sizes."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec


def stack_spec(**mixer: Any) -> ModuleSpec:
    """`mamba_stack_spec` with these arguments of the mixer."""
    spec = copy.deepcopy(mamba_stack_spec)
    spec.submodules.mamba_layer.submodules.mixer.params = mixer
    return spec


#: For command lines: `--spec tests.unit.ssm.support toy_stack_spec`. Widths from 8 on are enough for its heads, and a
#: sequence of 16 is three chunks.
toy_stack_spec = stack_spec(headdim=4, d_state=8, ngroups=4, chunk_size=6)

#: Mamba layers whose mixer is no MambaMixer.
foreign_stack_spec = copy.deepcopy(mamba_stack_spec)
foreign_stack_spec.submodules.mamba_layer.submodules.mixer = ModuleSpec(module=IdentityOp)
