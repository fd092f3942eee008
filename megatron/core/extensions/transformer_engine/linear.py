"""TransformerEngine's linear layers as column- and row-parallel linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformer_engine as te
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine.user_buffers import linear_options, norm_linear_options
from megatron.core.tensor_parallel import overlap
from megatron.core.tensor_parallel.placement import make_sharded_tensors_for_checkpoint
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

InitMethod = Callable[[Tensor], Any]
Offsets = tuple[tuple[int, int, int], ...]


def condition_init_method(config: TransformerConfig, init_method: InitMethod) -> InitMethod:
    """The given initialiser, or one that does nothing when `--no-initialization` (perform_initialization)
    says so.
    """
    return init_method if config.perform_initialization else lambda weight: None


def _shared_options(config: TransformerConfig, expert: bool) -> dict[str, Any]:
    """Constructor arguments that every TE linear gets from the configuration."""
    group = None if expert else parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    return {
        "sequence_parallel": config.sequence_parallel,
        "fuse_wgrad_accumulation": config.gradient_accumulation_fusion,
        "tp_group": group,
        "tp_size": 1 if expert else config.tensor_model_parallel_size,
        "get_rng_state_tracker": get_cuda_rng_tracker if get_cuda_rng_tracker().is_initialized() else None,
        "params_dtype": config.params_dtype,
        "device": "cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
    }


def _overlap_options(
    config: TransformerConfig, name: str | None, spell: Callable[[overlap.Overlap, str], dict[str, Any]]
) -> dict[str, Any]:
    """Constructor arguments about the overlap of transfers and products, for a layer that takes part in it."""
    if not config.tp_comm_overlap or name is None:
        return {}
    return spell(overlap.choose(config, name), name)


class _Linear(te.pytorch.Linear):
    """What the three linears share: the bias returned unadded on request, and the caching of fp8 weights."""

    te_return_bias: bool
    is_first_microbatch: bool

    def _remember(self, bias: bool, skip_bias_add: bool, config: TransformerConfig) -> None:
        self.config = config
        # TE returns the bias with an empty placeholder when there is none
        self.te_return_bias = skip_bias_add and bias
        self.is_first_microbatch = True
        self.disable_parameter_transpose_cache = config.disable_parameter_transpose_cache

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [s, b, in] -> (output [s, b, out], bias [out] if its addition was left to the caller)."""
        first = None if self.disable_parameter_transpose_cache else self.is_first_microbatch
        out = super().forward(x, is_first_microbatch=first)
        self.is_first_microbatch = False
        return out if self.te_return_bias else (out, None)


class TELinear(_Linear):
    """`parallel_mode` "column", "row" or None (each rank holds all of it)."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: TransformerConfig,
        init_method: InitMethod,
        bias: bool,
        skip_bias_add: bool,
        skip_weight_param_allocation: bool,
        tp_comm_buffer_name: str | None = None,
        is_expert: bool = False,
    ) -> None:
        if skip_weight_param_allocation:
            raise ValueError(
                "TransformerEngine linears always hold their weight; use the local linear instead"
            )
        super().__init__(
            in_features=input_size,
            out_features=output_size,
            bias=bias,
            return_bias=skip_bias_add and bias,
            parallel_mode=None if is_expert else parallel_mode,
            init_method=condition_init_method(config, init_method),
            **_shared_options(config, is_expert),
            **_overlap_options(config, None if is_expert else tp_comm_buffer_name, linear_options),
        )
        self._remember(bias, skip_bias_add, config)
        for parameter in self.parameters():
            parameter.allreduce = not (is_expert and config.expert_model_parallel_size > 1)


def _sharded(
    module: torch.nn.Module, prefix: str, dims: Mapping[str, int], offsets: Offsets
) -> dict[str, Any]:
    state = module.state_dict(prefix="", keep_vars=True)
    return make_sharded_tensors_for_checkpoint(state, prefix, dims, offsets)


class TEColumnParallelLinear(TELinear):
    """Weight [out/tp, in]; the output stays divided."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: InitMethod,
        gather_output: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        skip_weight_param_allocation: bool = False,
        tp_comm_buffer_name: str | None = None,
    ) -> None:
        if gather_output:
            raise ValueError("TransformerEngine linears cannot gather their output; pass gather_output=False")
        super().__init__(
            input_size,
            output_size,
            parallel_mode="column",
            config=config,
            init_method=init_method,
            bias=bias,
            skip_bias_add=skip_bias_add,
            skip_weight_param_allocation=skip_weight_param_allocation,
            tp_comm_buffer_name=tp_comm_buffer_name,
            is_expert=is_expert,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Weight and bias cut along the output."""
        return _sharded(self, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


class TERowParallelLinear(TELinear):
    """Weight [out, in/tp]; the input is divided already."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: InitMethod,
        bias: bool,
        input_is_parallel: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
    ) -> None:
        if not input_is_parallel:
            raise ValueError("TransformerEngine linears expect a divided input; pass input_is_parallel=True")
        super().__init__(
            input_size,
            output_size,
            parallel_mode="row",
            config=config,
            init_method=init_method,
            bias=bias,
            skip_bias_add=skip_bias_add,
            skip_weight_param_allocation=False,
            tp_comm_buffer_name=tp_comm_buffer_name,
            is_expert=is_expert,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Weight cut along the input; the bias is whole on every rank."""
        return _sharded(self, prefix, {"weight": 1}, sharded_offsets)


class TELayerNormColumnParallelLinear(te.pytorch.LayerNormLinear):
    """Norm and column-parallel linear in one module: parameters layer_norm_{weight,bias} [in], weight
    [out/tp, in].
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: InitMethod,
        gather_output: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        skip_weight_param_allocation: bool = False,
        tp_comm_buffer_name: str | None = None,
    ) -> None:
        if gather_output or is_expert or skip_weight_param_allocation:
            raise ValueError(
                "the norm-linear neither gathers its output, nor serves experts, nor borrows its weight"
            )
        super().__init__(
            in_features=input_size,
            out_features=output_size,
            eps=config.layernorm_epsilon,
            bias=bias,
            return_bias=skip_bias_add and bias,
            normalization=config.normalization,
            zero_centered_gamma=config.layernorm_zero_centered_gamma,
            parallel_mode="column",
            return_layernorm_output=False,
            init_method=condition_init_method(config, init_method),
            **_shared_options(config, False),
            **_overlap_options(config, tp_comm_buffer_name, norm_linear_options),
        )
        self.config = config
        self.te_return_bias = skip_bias_add and bias
        self.is_first_microbatch = True
        self.disable_parameter_transpose_cache = config.disable_parameter_transpose_cache

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [s, b, in] -> (output [s, b, out/tp], bias [out/tp] if its addition was left to the caller)."""
        first = None if self.disable_parameter_transpose_cache else self.is_first_microbatch
        out = super().forward(x, is_first_microbatch=first)
        self.is_first_microbatch = False
        return out if self.te_return_bias else (out, None)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Weight and bias cut along the output; the norm's parameters are whole on every rank."""
        return _sharded(self, prefix, {"weight": 0, "bias": 0}, sharded_offsets)
