"""The stack of a hybrid model that one pipeline stage holds: Mamba, attention and MLP layers in turn, and the final norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.errors import InvariantError
from megatron.core.inference_params import InferenceParams
from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols, allocate_layers
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.layer_split import layers_here
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.recompute import plan_recompute, run_stack
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_layer_norm import WrappedTorchLayerNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import make_viewless_tensor


@dataclass
class MambaStackSubmodules:
    """One specification for each kind of layer."""

    mamba_layer: ModuleSpec | type = IdentityOp
    attention_layer: ModuleSpec | type = IdentityOp
    mlp_layer: ModuleSpec | type = IdentityOp


class MambaStack(MegatronModule):
    """Layers of several kinds in sequence; which one stands where, `allocate_layers` says for the whole model.

    Pipeline stages hold consecutive layers. InvariantError for a virtual pipeline and for context parallelism: the state
    of a Mamba layer is handed on along the whole sequence.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaStackSubmodules,
        mamba_ssm_ngroups: int = 8,
        residual_in_fp32: bool = False,
        pre_process: bool = True,
        hybrid_attention_ratio: float = 0.0,
        hybrid_mlp_ratio: float = 0.0,
        hybrid_override_pattern: str | None = None,
        post_layer_norm: bool = True,
        post_process: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        _check_layout(config)
        self.pre_process = pre_process
        self.post_process = post_process
        self.post_layer_norm = post_layer_norm
        self.input_tensor: Tensor | None = None

        kinds = allocate_layers(
            config.num_layers, hybrid_attention_ratio, hybrid_mlp_ratio, hybrid_override_pattern
        )
        here = layers_here(config, pg_collection)
        self.layer_type_list = [kinds[index] for index in here]
        self.layers = nn.ModuleList()
        for local, kind in enumerate(self.layer_type_list):
            if kind == Symbols.MAMBA:
                layer = build_module(
                    submodules.mamba_layer,
                    config=config,
                    mamba_ssm_ngroups=mamba_ssm_ngroups,
                    residual_in_fp32=residual_in_fp32,
                    layer_number=here[local] + 1,
                    pg_collection=pg_collection,
                )
            else:
                transformer = {
                    Symbols.ATTENTION: submodules.attention_layer,
                    Symbols.MLP: submodules.mlp_layer,
                }
                # A transformer layer counts from the first of its stage.
                layer = build_module(
                    transformer[kind], config=config, layer_number=local + 1, pg_collection=pg_collection
                )
            self.layers.append(layer)
        self.num_layers_per_pipeline_rank = len(self.layers)
        self.final_norm = None
        if post_process and post_layer_norm:
            self.final_norm = WrappedTorchLayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.segments = (
            plan_recompute(len(self.layers), config.recompute_method, config.recompute_num_layers)
            if config.recompute_granularity == "full"
            else None
        )
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Empty states of the Mamba layers, by their position in this stage."""
        return {
            index: layer.allocate_inference_cache(batch_size, max_seqlen, dtype)
            for index, layer in enumerate(self.layers)
            if isinstance(layer, MambaLayer)
        }

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """Store the previous stage's output [s/sp, b, h], which `forward` takes in place of its argument."""
        self.input_tensor = input_tensor

    def forward(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        inference_params: InferenceParams | None = None,
        rotary_pos_emb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [s/sp, b, h] (ignored after the first stage), mask of the attention layers bool
        [b or 1, 1, s, s] or None (causal) -> [s/sp, b, h].
        """
        hidden = hidden_states if self.pre_process else self.input_tensor
        if hidden is None:
            raise ValueError(
                "a stage needs hidden_states (the first) or set_input_tensor before its forward pass"
            )
        # The schedule frees a stage's output by emptying its storage, which a view would keep alive.
        hidden = make_viewless_tensor(inp=hidden, requires_grad=True, keep_graph=True)

        def run_layers(start: int, stop: int, hidden: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
            for layer in self.layers[start:stop]:
                output = layer(
                    hidden,
                    attention_mask,
                    inference_params=inference_params,
                    rotary_pos_emb=rotary_pos_emb,
                )
                hidden = output[0] if isinstance(output, tuple) else output
            return hidden, None

        hidden, _ = run_stack(
            self.config, self.segments, len(self.layers), run_layers, hidden, None, self.training
        )

        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
            hidden = make_viewless_tensor(inp=hidden, requires_grad=True, keep_graph=True)
        return hidden

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Each layer under its own name `layers.<global index>.<part>`: layers of several kinds cannot be stacked."""
        if sharded_offsets:
            raise InvariantError(
                "sharded_offsets", "a stack's layers have names of their own", "leave it empty"
            )
        sharded: dict[str, Any] = {}
        for local, layer in enumerate(self.layers):
            own = sharded_state_dict_default(layer, f"{prefix}layers.{local}.", (), metadata)
            index = int(layer.layer_number) - 1  # type: ignore[arg-type]
            replace_prefix_for_sharding(own, f"{prefix}layers.{local}.", f"{prefix}layers.{index}.")
            sharded.update(own)
        for name, module in self.named_children():
            if module is not self.layers:
                sharded.update(sharded_state_dict_default(module, f"{prefix}{name}.", (), metadata))
        return sharded


def _check_layout(config: TransformerConfig) -> None:
    """InvariantError for what no hybrid stack can do."""
    if config.context_parallel_size > 1:
        raise InvariantError(
            "--context-parallel-size",
            "the state of a Mamba layer is handed on along the whole sequence, which is not divided",
            "use --tensor-model-parallel-size with --sequence-parallel to divide long samples",
        )
    if config.virtual_pipeline_model_parallel_size is not None:
        raise InvariantError(
            "--num-layers-per-virtual-pipeline-stage", "a hybrid stack has no interleaved schedule", "drop it"
        )
