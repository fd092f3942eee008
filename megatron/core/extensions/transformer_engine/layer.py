"""A GPT layer of TransformerEngine's modules: norms fused into the linear layers that follow them, fp8 if configured."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import transformer_engine as te
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.errors import ConfigError
from megatron.core.extensions.transformer_engine.attention import TEDotProductAttention
from megatron.core.extensions.transformer_engine.linear import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.extensions.transformer_engine.norm import TENorm
from megatron.core.extensions.transformer_engine.state import TEDelayedScaling
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


def fp8_recipe(config: TransformerConfig) -> Any:
    """TransformerEngine's recipe for what the configuration asks, None without fp8."""
    if config.fp8 is None:
        return None
    fmt = te.common.recipe.Format.HYBRID if config.fp8 == "hybrid" else te.common.recipe.Format.E4M3
    if config.fp8_recipe == "tensorwise":
        return te.common.recipe.Float8CurrentScaling(fp8_format=fmt)
    return TEDelayedScaling(config, fmt, override_linear_precision=(False, False, not config.fp8_wgrad))


class TETransformerLayer(TransformerLayer):
    """A layer whose TransformerEngine modules run under their fp8 context where the configuration says fp8.

    ConfigError for fp8 with recomputation, which that package's context does not see through.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._recipe = fp8_recipe(config)
        if self._recipe is not None and config.recompute_granularity is not None:
            raise ConfigError(
                "--fp8-format --recompute-granularity",
                "TransformerEngine would note the magnitudes of recomputed activations twice",
                "drop one of the two, or give --transformer-impl local",
            )

    def _fp8(self) -> AbstractContextManager[Any]:
        group = parallel_state.get_amax_reduction_group(True, self.config.tp_only_amax_red)
        return te.pytorch.fp8_autocast(enabled=True, fp8_recipe=self._recipe, fp8_group=group)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Arguments and result of `TransformerLayer.forward`: hidden_states [s/sp, b, h] -> the same, and the context."""
        if self._recipe is None:
            return super().forward(*args, **kwargs)
        with self._fp8():
            return super().forward(*args, **kwargs)


def gpt_layer_spec(
    num_experts: int | None = None, moe_grouped_gemm: bool = False, qk_layernorm: bool = False
) -> ModuleSpec:
    """A GPT layer with a dense MLP or, given `num_experts`, a mixture of experts."""
    head_norm = TENorm if qk_layernorm else IdentityOp
    if num_experts is None:
        mlp = ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(
                linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear
            ),
        )
    else:
        experts = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
        mlp = ModuleSpec(module=MoELayer, submodules=None if moe_grouped_gemm else experts)
    return ModuleSpec(
        module=TETransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=TELayerNormColumnParallelLinear,
                    core_attention=TEDotProductAttention,
                    linear_proj=TERowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if num_experts is None else TENorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
