"""The stack of layers one pipeline stage (or virtual chunk) holds, and the final norm on the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.errors import InvariantError
from megatron.core.fp8 import config_of_layer
from megatron.core.inference_params import InferenceParams
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.layer_split import layers_here
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.recompute import plan_recompute, run_stack
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_layer_norm import WrappedTorchLayerNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import make_viewless_tensor


def get_num_layers_to_build(config: TransformerConfig) -> int:
    """How many layers this rank's current chunk holds."""
    return len(layers_here(config))


@dataclass
class TransformerBlockSubmodules:
    """The layers of this chunk, one spec each, and the norm after the last layer of the model."""

    layer_specs: list[ModuleSpec] | None = None
    layer_norm: ModuleSpec | type | None = None


def _block_submodules(
    config: TransformerConfig, spec: TransformerBlockSubmodules | ModuleSpec, pg_collection: Any
) -> TransformerBlockSubmodules:
    """What to stack: as given, from a spec of a block, or one layer spec repeated for this chunk."""
    if isinstance(spec, TransformerBlockSubmodules):
        return spec
    if isinstance(spec, ModuleSpec) and isinstance(spec.module, type):
        if issubclass(spec.module, TransformerBlock):
            return spec.submodules
        if issubclass(spec.module, BaseTransformerLayer):
            count = len(layers_here(config, pg_collection))
            return TransformerBlockSubmodules([spec] * count, WrappedTorchLayerNorm)
    raise ValueError(
        f"a block is built from TransformerBlockSubmodules or from the ModuleSpec of a block or layer class, not {spec!r}"
    )


class TransformerBlock(MegatronModule):
    """Layers in sequence, with recomputation and the random state that sequence parallel dropout needs."""

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules | ModuleSpec,
        post_layer_norm: bool = True,
        pre_process: bool = True,
        post_process: bool = True,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        self.submodules = _block_submodules(config, spec, pg_collection)
        self.post_layer_norm = post_layer_norm
        self.pre_process = pre_process
        self.post_process = post_process
        self.input_tensor: Tensor | None = None
        # The layers see to it themselves; users' code asks here.
        self.checkpoint_core_attention = config.recompute_granularity == "selective"

        specs = self.submodules.layer_specs or []
        before = layers_here(config, pg_collection).start
        self.layers = nn.ModuleList(
            build_module(
                layer,
                config=config_of_layer(config, before + i),
                layer_number=i + 1,
                pg_collection=pg_collection,
            )
            for i, layer in enumerate(specs)
        )
        self.num_layers_per_pipeline_rank = len(self.layers)
        self.final_layernorm = None
        if post_process and post_layer_norm and self.submodules.layer_norm is not None:
            self.final_layernorm = build_module(
                self.submodules.layer_norm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )
        self.segments = (
            plan_recompute(len(self.layers), config.recompute_method, config.recompute_num_layers)
            if config.recompute_granularity == "full"
            else None
        )

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """Store the previous stage's output [s/sp, b, h], which `forward` takes in place of its argument."""
        self.input_tensor = input_tensor

    def forward(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """hidden_states [s/sp, b, h] (ignored after the first stage), masks bool [b or 1, 1, sq, sk] or
        None, context [sk/sp, b, h] -> [s/sp, b, h].
        """
        hidden = hidden_states if self.pre_process else self.input_tensor
        if hidden is None:
            raise ValueError(
                "a stage needs hidden_states (the first) or set_input_tensor before its forward pass"
            )
        # The schedule frees a stage's output by emptying its storage, which a view would keep alive.
        hidden = make_viewless_tensor(inp=hidden, requires_grad=True, keep_graph=True)

        def run_layers(
            start: int, stop: int, hidden: Tensor, context: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            for index in range(start, stop):
                hidden, context = self.layers[index](
                    hidden_states=hidden,
                    attention_mask=attention_mask,
                    context=context,
                    context_mask=context_mask,
                    rotary_pos_emb=rotary_pos_emb,
                    inference_params=inference_params,
                    packed_seq_params=packed_seq_params,
                )
            return hidden, context

        hidden, context = run_stack(
            self.config, self.segments, len(self.layers), run_layers, hidden, context, self.training
        )

        if self.final_layernorm is not None:
            hidden = self.final_layernorm(hidden)
            hidden = make_viewless_tensor(inp=hidden, requires_grad=True, keep_graph=True)
        return hidden

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Layers stacked along a leading axis of the model's depth, under one name `layers.<part>`.

        With metadata["non_homogeneous_layers"] each layer keeps its own name `layers.<global index>.<part>`
        instead.
        """
        if sharded_offsets:
            raise InvariantError(
                "sharded_offsets", "a block's layers already form the stacked axis", "leave it empty"
            )
        separate = bool(metadata and metadata.get("non_homogeneous_layers", False))
        layers = f"{prefix}layers."
        sharded: dict[str, Any] = {}
        for local, layer in enumerate(self.layers):
            index = int(layer.layer_number) - 1  # type: ignore[arg-type]
            stacked = () if separate else ((0, index, self.config.num_layers),)
            own = sharded_state_dict_default(layer, f"{layers}{local}.", stacked, metadata)
            replace_prefix_for_sharding(own, f"{layers}{local}.", f"{layers}{index}." if separate else layers)
            sharded.update(own)
        for name, module in self.named_children():
            if module is not self.layers:
                sharded.update(sharded_state_dict_default(module, f"{prefix}{name}.", (), metadata))
        return sharded
