"""Linear layers and embeddings whose weights are divided among the tensor-parallel ranks.

Megatron-LM (arXiv:1909.08053): a column-parallel layer followed by a row-parallel one needs a single all-reduce in
each direction. With sequence parallelism (arXiv:2205.05198) the all-reduce becomes an all-gather before the first
and a reduce-scatter after the second, and what lies between the pairs is divided along the sequence.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from megatron.core import device, fp8, parallel_state
from megatron.core.fusions.grad_accumulation import choose as choose_wgrad_accumulation
from megatron.core.kernels import registry
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import overlap, placement
from megatron.core.tensor_parallel.fp8_linear import fp8_linear
from megatron.core.tensor_parallel.linear import (  # noqa: F401  (v0.9 keeps these names here)
    Accumulate,
    LinearWithFrozenWeight,
    LinearWithGradAccumulationAndAsyncCommunication,
    linear_scattered_to_sequence_parallel_region,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.placement import (  # noqa: F401  (v0.9 keeps these names here)
    Offsets,
    Placed,
    copy_tensor_model_parallel_attributes,
    make_sharded_tensors_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
    param_is_not_tensor_parallel_duplicate,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.tensor_parallel.utils import VocabUtility
from megatron.core.utils import divide

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

InitMethod = Callable[[Tensor], Any]


# Weights ----------------------------------------------------------------------------------------------------------


def _cut_from_full(
    full_shape: tuple[int, int],
    init_method: InitMethod,
    placed: Placed,
    rank: int,
    size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(this rank's piece, the whole matrix in fp32): every rank draws the same whole and keeps its piece.

    With stride n the cut dimension is first divided into size x n chunks, of which a rank takes every size-th: each
    of n stacked matrices is divided on its own.
    """
    assert placed.dim is not None, "a whole parameter is not cut"
    full = torch.empty(full_shape, dtype=torch.promote_types(dtype, torch.float32))
    init_method(full)
    chunk = divide(divide(full_shape[placed.dim], size), placed.stride)
    pieces = full.to(dtype).split(chunk, dim=placed.dim)
    return torch.cat(pieces[rank::size], dim=placed.dim), full


def new_weight(
    shape: tuple[int, int],
    full_shape: tuple[int, int],
    placed: Placed,
    config: ModelParallelConfig,
    init_method: InitMethod,
    rank: int,
    size: int,
) -> tuple[Parameter, Tensor | None]:
    """A weight as the configuration wants it: (parameter, full matrix if it was drawn).

    `use_cpu_initialization` draws the whole matrix from the host generator, so values do not depend on the number
    of ranks; otherwise each rank draws its own piece under the tracker's model-parallel (expert) state.
    """
    if config.use_cpu_initialization:
        weight = Parameter(torch.empty(shape, dtype=config.params_dtype))
        placement.mark(weight, placed)
        if not config.perform_initialization:
            return weight, None
        piece, full = _cut_from_full(full_shape, init_method, placed, rank, size, config.params_dtype)
        with torch.no_grad():
            weight.copy_(piece)
        return weight, full
    weight = Parameter(torch.empty(shape, dtype=config.params_dtype, device=device.current()))
    placement.mark(weight, placed)
    if config.perform_initialization:
        tracker = get_cuda_rng_tracker()
        state = tracker.fork(get_expert_parallel_rng_tracker_name()) if placed.expert else tracker.fork()
        with state:
            init_method(weight)
    return weight, None


def _new_bias(size: int, placed: Placed, config: ModelParallelConfig) -> Parameter:
    """A bias, zero however weights are initialised."""
    where = torch.device("cpu") if config.use_cpu_initialization else device.current()
    bias = Parameter(torch.empty(size, dtype=config.params_dtype, device=where))
    placement.mark(bias, placed)
    if config.perform_initialization:
        with torch.no_grad():
            bias.zero_()
    return bias


def _fused_accumulation(config: ModelParallelConfig, weight: Tensor | None) -> Accumulate | None:
    """The function that adds weight gradients into main_grad, or None where the configuration has it off."""
    if not config.gradient_accumulation_fusion:
        return None
    kind = device.kind() if weight is None else weight.device.type
    return choose_wgrad_accumulation(kind, config.params_dtype)


class _LookupWithGradAccumulation(torch.autograd.Function):
    """Rows of a table whose gradient is added into main_grad row by row: no gradient of the table's size exists."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, foreign: Tensor | None, weight: Tensor, accumulate: Accumulate
    ) -> Tensor:
        """ids [..] of rows, weight [v, h] -> [.., h]; foreign bool [..] marks rows that get no gradient."""
        ctx.save_for_backward(ids if foreign is None else ids.masked_fill(foreign, -1), weight)
        ctx.accumulate = accumulate
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, None, None]:
        """grad_output [.., h] is added to the rows of main_grad."""
        ids, weight = ctx.saved_tensors
        ctx.accumulate(ids.reshape(-1), grad_output.reshape(-1, grad_output.shape[-1]), weight.main_grad)
        weight.grad_added_to_main_grad = True
        return None, None, None, None


class VocabParallelEmbedding(torch.nn.Module):
    """A word embedding whose rows are divided among the tensor-parallel ranks.

    Each rank looks up the ids it owns, zeroes the rest, and the sum over ranks is the embedding.
    reduce_scatter_embeddings: that sum is delivered divided along the sequence (for sequence parallelism).
    """

    PLACEMENT = {"weight": Placed(dim=0, over="tp")}  # weight [v/tp, h]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        init_method: InitMethod,
        reduce_scatter_embeddings: bool = False,
        config: ModelParallelConfig,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        self.pg_collection = groups = parallel_state.resolve(pg_collection)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.reduce_scatter_embeddings = reduce_scatter_embeddings
        self.tensor_model_parallel_size = groups.size("tp")
        self.deterministic_mode = config.deterministic_mode
        first, end = VocabUtility.vocab_range_from_global_vocab_size(
            num_embeddings, groups.rank("tp"), self.tensor_model_parallel_size
        )
        self.vocab_start_index, self.vocab_end_index = first, end
        self.num_embeddings_per_partition = end - first
        self.weight, _ = new_weight(
            (self.num_embeddings_per_partition, embedding_dim),
            (num_embeddings, embedding_dim),
            self.PLACEMENT["weight"],
            config,
            init_method,
            groups.rank("tp"),
            groups.size("tp"),
        )
        self._accumulate: Accumulate | None = None
        if config.gradient_accumulation_fusion:
            spec = registry.Spec(self.weight.device.type, config.params_dtype)
            self._accumulate = registry.select("embedding_grad", spec)

    def forward(self, input_: Tensor) -> Tensor:
        """ids [b, s] -> embeddings [b, s, h], or [s/tp, b, h] with reduce_scatter_embeddings."""
        ids, foreign = input_, None
        if self.tensor_model_parallel_size > 1:
            foreign = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
            ids = (input_ - self.vocab_start_index).masked_fill(foreign, 0)
        if self._accumulate is not None and self.weight.requires_grad and hasattr(self.weight, "main_grad"):
            output = _LookupWithGradAccumulation.apply(ids, foreign, self.weight, self._accumulate)
        elif self.deterministic_mode:
            output = self.weight[ids]  # has a deterministic gradient on every device, F.embedding has not
        else:
            output = F.embedding(ids, self.weight)
        if foreign is not None:
            output.masked_fill_(foreign.unsqueeze(-1), 0.0)
        if self.reduce_scatter_embeddings:
            output = output.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(output, group=self.pg_collection.tp)
        return reduce_from_tensor_model_parallel_region(output, group=self.pg_collection.tp)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight as a checkpoint record; its padded vocabulary may differ from the stored one."""
        key = f"{prefix}weight"
        return {
            key: make_tp_sharded_tensor_for_checkpoint(
                self.weight,
                key,
                allow_shape_mismatch=True,
                prepend_offsets=sharded_offsets,
                pg_collection=self.pg_collection,
            )
        }


class _ParallelLinear(torch.nn.Module):
    """What column- and row-parallel layers share: groups, flags, checkpoint records, the empty extra state."""

    PLACEMENT: dict[str, Placed] = {}

    def __init__(
        self,
        input_size: int,
        output_size: int,
        config: ModelParallelConfig,
        is_expert: bool,
        skip_bias_add: bool,
        pg_collection: ProcessGroupCollection | None,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.output_size = output_size
        self.config = config
        self.is_expert = is_expert
        self.skip_bias_add = skip_bias_add
        self.pg_collection = groups = parallel_state.resolve(pg_collection)
        self.expert_parallel = config.expert_model_parallel_size > 1
        # Tokens of experts are brought together and summed by the dispatcher, not by the layer.
        self.explicit_expert_comm = is_expert and (config.sequence_parallel or self.expert_parallel)
        split_over = "tp_ep" if self.explicit_expert_comm and config.moe_extended_tp else "tp"
        self.partitions, self.partition = groups.size(split_over), groups.rank(split_over)
        self.gradient_accumulation_fusion = config.gradient_accumulation_fusion
        self._accumulate: Accumulate | None = None
        self._fp8: fp8.Fp8Operands | None = None
        self.is_first_microbatch = True  # of a step: what was derived from the weight is stale
        self._register_load_state_dict_pre_hook(_accept_missing_extra_state)

    def _placed(self, name: str, stride: int) -> Placed:
        declared = self.PLACEMENT[name]
        return Placed(
            dim=declared.dim,
            over=declared.over,
            stride=stride,
            expert=self.is_expert and self.expert_parallel,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Weight, bias and extra state as checkpoint records."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {name: placed.dim for name, placed in self.PLACEMENT.items() if placed.dim is not None},
            sharded_offsets,
            pg_collection=self.pg_collection,
        )

    def _product_in_fp8(
        self,
        input_: Tensor,
        bias: Tensor | None,
        *,
        sequence_parallel: bool = False,
        allreduce_dgrad: bool = False,
    ) -> Tensor:
        """What `linear_with_grad_accumulation_and_async_allreduce` computes, with the layer's own weight, in fp8."""
        assert self._fp8 is not None, "the layer was not built for fp8"
        assert isinstance(self.weight, Parameter), "an fp8 layer has a weight of its own"
        fresh, self.is_first_microbatch = self.is_first_microbatch, False
        return fp8_linear(
            input_,
            self.weight,
            bias,
            self._fp8,
            fresh=fresh,
            training=self.training,
            gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            sequence_parallel=sequence_parallel,
            allreduce_dgrad=allreduce_dgrad,
            group=self.pg_collection.tp,
            accumulate=self._accumulate,
        )

    def set_extra_state(self, state: Any) -> None:
        """Continue with the fp8 scales of a checkpoint, where it and this layer have such; all else is ignored."""
        if self._fp8 is not None:
            self._fp8.load_state(state)

    def get_extra_state(self) -> Tensor | None:
        """Delayed fp8 scales, or nothing. The entry always exists, so that checkpoints interchange."""
        return None if self._fp8 is None else self._fp8.state()

    @property
    def _kept_weight(self) -> fp8.Fp8Weight | None:
        """What the weight's fp8 numbers stand for, if it is kept in fp8."""
        return None if self._fp8 is None else self._fp8.kept_weight

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Checkpoints hold what the numbers of a weight that is kept in fp8 stand for."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (kept := self._kept_weight) is not None:
            destination[f"{prefix}weight"] = kept.as_record() if keep_vars else kept.values()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A weight that is kept in fp8 is rounded by the scales of the extra state, so after that was loaded."""
        kept, values = self._kept_weight, state_dict.get(f"{prefix}weight")
        if kept is not None:
            kept.operands.forget_weight()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if kept is not None and values is not None and values.shape == kept.param.shape:
            kept.restore(values)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.input_size} -> {self.output_size} / {self.partitions}"


def _accept_missing_extra_state(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints written without extra state load strictly."""
    state_dict.setdefault(f"{prefix}_extra_state")


class ColumnParallelLinear(_ParallelLinear):
    """y = x A + b with A divided by columns: every rank computes its part of the outputs.

    gather_output: deliver the whole output on every rank. skip_bias_add: return the bias instead of adding it, for
    the caller to fuse. stride: matrices stacked along the output (2: gate and up projection).
    skip_weight_param_allocation: the weight is passed to `forward` (tied embeddings).
    keep_master_weight_for_test: keep the full matrix as `master_weight`.
    embedding_activation_buffer, grad_output_buffer: where `defer_embedding_wgrad_compute` collects.
    is_expert: a layer of an expert. tp_comm_buffer_name: what settings of --tp-comm-overlap call this layer.
    disable_grad_reduce: leave the sum of the input's gradient to the caller.
    """

    PLACEMENT = {"weight": Placed(dim=0, over="tp"), "bias": Placed(dim=0, over="tp")}  # weight [out/tp, in]

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        init_method: InitMethod,
        bias: bool = True,
        gather_output: bool = False,
        stride: int = 1,
        keep_master_weight_for_test: bool = False,
        skip_bias_add: bool = False,
        skip_weight_param_allocation: bool = False,
        embedding_activation_buffer: list[Tensor] | None = None,
        grad_output_buffer: list[Tensor] | None = None,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        disable_grad_reduce: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(input_size, output_size, config, is_expert, skip_bias_add, pg_collection)
        self.gather_output = gather_output
        self.embedding_activation_buffer = embedding_activation_buffer
        self.grad_output_buffer = grad_output_buffer
        self.disable_grad_reduce = disable_grad_reduce
        self.output_size_per_partition = divide(output_size, self.partitions)
        self.master_weight: Tensor | None = None

        self.weight: Parameter | None = None
        if not skip_weight_param_allocation:
            self.weight, full = new_weight(
                (self.output_size_per_partition, input_size),
                (output_size, input_size),
                self._placed("weight", stride),
                config,
                init_method,
                self.partition,
                self.partitions,
            )
            self.master_weight = full if keep_master_weight_for_test else None
        if bias:
            self.bias = _new_bias(self.output_size_per_partition, self._placed("bias", stride), config)
        else:
            self.register_parameter("bias", None)

        tp_size = self.pg_collection.size("tp")
        self.sequence_parallel = config.sequence_parallel and tp_size > 1
        if config.sequence_parallel and tp_size == 1:
            warnings.warn(
                "sequence_parallel does nothing with a tensor-parallel size of 1; it is off here",
                stacklevel=2,
            )
        self.allreduce_dgrad = tp_size > 1 and not self.sequence_parallel and not disable_grad_reduce
        if self.sequence_parallel and gather_output:
            raise RuntimeError("ColumnParallelLinear: gather_output and sequence_parallel exclude each other")
        self._overlap = overlap.choose(config, tp_comm_buffer_name)
        self._accumulate = _fused_accumulation(config, self.weight)
        if self.weight is not None:
            self._fp8 = fp8.choose(config, input_size, self.output_size_per_partition)

    def forward(self, input_: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """input [s, b, in] ([s/tp, b, in] with sequence parallelism) -> output [s, b, out/tp], bias to be added.

        The output is [s, b, out] with gather_output; the bias [out/tp] is None unless skip_bias_add.
        RuntimeError for a weight of the wrong shape, or none where the layer has none of its own.
        """
        if weight is None:
            weight = self.weight
            if weight is None:
                raise RuntimeError(
                    "ColumnParallelLinear: skip_weight_param_allocation is True, so forward needs a weight"
                )
        elif weight.shape != (self.output_size_per_partition, self.input_size):
            raise RuntimeError(
                f"ColumnParallelLinear: the supplied weight has shape {tuple(weight.shape)}, expected "
                f"{(self.output_size_per_partition, self.input_size)}"
            )
        group = self.pg_collection.tp
        if not (
            self.allreduce_dgrad
            or self.sequence_parallel
            or self.explicit_expert_comm
            or self.disable_grad_reduce
        ):
            input_ = copy_to_tensor_model_parallel_region(input_, group=group)
        self._collect_activation(input_, weight)

        bias = None if self.skip_bias_add else self.bias
        sequence_parallel = self.sequence_parallel and not self.explicit_expert_comm
        allreduce_dgrad = self.allreduce_dgrad and not self.explicit_expert_comm
        if self._fp8 is not None:
            output = self._product_in_fp8(
                input_, bias, sequence_parallel=sequence_parallel, allreduce_dgrad=allreduce_dgrad
            )
        elif weight.requires_grad:
            output = linear_with_grad_accumulation_and_async_allreduce(
                input_,
                weight,
                bias,
                self.gradient_accumulation_fusion,
                sequence_parallel,
                allreduce_dgrad,
                grad_output_buffer=self.grad_output_buffer if self._defers else None,
                wgrad_deferral_limit=self.config.wgrad_deferral_limit if self._defers else 0,
                group=group,
                accumulate=self._accumulate,
                overlap=self._overlap,
            )
        else:
            output = linear_with_frozen_weight(
                input_,
                weight,
                bias,
                self.gradient_accumulation_fusion,
                allreduce_dgrad,
                sequence_parallel,
                group=group,
            )
        if self.gather_output:
            output = gather_from_tensor_model_parallel_region(output, group=group)
        return output, self.bias if self.skip_bias_add else None

    @property
    def _defers(self) -> bool:
        return self.config.defer_embedding_wgrad_compute and self.grad_output_buffer is not None

    def _collect_activation(self, input_: Tensor, weight: Tensor) -> None:
        """Keep the input for the weight gradient that is computed later, up to the limit."""
        buffer, limit = self.embedding_activation_buffer, self.config.wgrad_deferral_limit
        collects = self._defers and weight.requires_grad and torch.is_grad_enabled()
        if buffer is not None and collects and (not limit or len(buffer) < limit):
            buffer.append(input_.detach())


class RowParallelLinear(_ParallelLinear):
    """y = x A + b with A divided by rows and x by columns: the outputs are summed over the ranks.

    input_is_parallel: x is divided already (the output of a column-parallel layer). The bias is whole on every
    rank and added after the sum. Other arguments as in ColumnParallelLinear. RuntimeError for sequence parallelism
    with an undivided input.
    """

    PLACEMENT = {"weight": Placed(dim=1, over="tp"), "bias": Placed()}  # weight [out, in/tp], bias [out]

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        init_method: InitMethod,
        bias: bool,
        input_is_parallel: bool,
        skip_bias_add: bool,
        stride: int = 1,
        keep_master_weight_for_test: bool = False,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(input_size, output_size, config, is_expert, skip_bias_add, pg_collection)
        self.input_is_parallel = input_is_parallel
        self.sequence_parallel = config.sequence_parallel and self.pg_collection.size("tp") > 1
        if self.sequence_parallel and not input_is_parallel:
            raise RuntimeError("To enable `sequence_parallel`, `input_is_parallel` must be `True`")
        self.input_size_per_partition = divide(input_size, self.partitions)
        self.weight, full = new_weight(
            (output_size, self.input_size_per_partition),
            (output_size, input_size),
            self._placed("weight", stride),
            config,
            init_method,
            self.partition,
            self.partitions,
        )
        self.master_weight = full if keep_master_weight_for_test else None
        if bias:
            self.bias = _new_bias(output_size, self._placed("bias", 1), config)
            self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        else:
            self.register_parameter("bias", None)
        self._overlap = overlap.choose(config, tp_comm_buffer_name)
        self._accumulate = _fused_accumulation(config, self.weight)
        self._fp8 = fp8.choose(config, self.input_size_per_partition, output_size)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """input [s, b, in/tp] -> output [s, b, out] ([s/tp, b, out] with sequence parallelism), bias to be added.

        Without input_is_parallel the input is [s, b, in]. The bias [out] is None unless skip_bias_add.
        """
        group = self.pg_collection.tp
        if not self.input_is_parallel:
            input_ = scatter_to_tensor_model_parallel_region(input_, group=group)
        # The bias is added after the sum over ranks; where there is nothing to sum the product can add it.
        adds_bias = self.bias is not None and not self.skip_bias_add
        fused_bias = self.bias if adds_bias and self.partitions == 1 else None
        scatters = self._overlap.scatters and self.sequence_parallel and not self.explicit_expert_comm
        if scatters and self._fp8 is None and self.weight.requires_grad:
            assert group is not None, "sequence parallelism has a tensor-parallel group"
            output = linear_scattered_to_sequence_parallel_region(
                input_, self.weight, self.gradient_accumulation_fusion, group, self._accumulate
            )
        else:
            output = self._product(input_, fused_bias)
            if self.explicit_expert_comm:
                assert self.skip_bias_add, (
                    "the dispatcher sums expert outputs, so the bias must be left to it"
                )
            elif self.sequence_parallel:
                output = reduce_scatter_to_sequence_parallel_region(output, group=group)
            else:
                output = reduce_from_tensor_model_parallel_region(output, group=group)
        if adds_bias and fused_bias is None:
            output = output + self.bias
        return output, self.bias if self.skip_bias_add else None

    def _product(self, input_: Tensor, bias: Tensor | None) -> Tensor:
        """This rank's part of the sum: [s, b, in/tp] -> [s, b, out]."""
        if self._fp8 is not None:
            return self._product_in_fp8(input_, bias)
        group, fuses = self.pg_collection.tp, self.gradient_accumulation_fusion
        if not self.weight.requires_grad:
            return linear_with_frozen_weight(input_, self.weight, bias, fuses, False, False, group=group)
        return linear_with_grad_accumulation_and_async_allreduce(
            input_, self.weight, bias, fuses, False, False, group=group, accumulate=self._accumulate
        )


def fp8_layers(chunk: torch.nn.Module) -> list[tuple[_ParallelLinear, fp8.Fp8Operands]]:
    """The linear layers of a model chunk whose products are in fp8, with their operands."""
    return [
        (module, module._fp8)
        for module in chunk.modules()
        if isinstance(module, _ParallelLinear) and module._fp8 is not None
    ]


def keep_weights_in_fp8(chunk: torch.nn.Module) -> None:
    """Make the weights of a chunk's fp8 layers fp8 numbers themselves (`core/fp8/weights.py`), frozen ones excepted."""
    for layer, operands in fp8_layers(chunk):
        assert isinstance(layer.weight, Parameter), "an fp8 layer has a weight of its own"
        if layer.weight.requires_grad:
            operands.keep_weight(layer.weight)


def update_fp8_scales(model: Sequence[torch.nn.Module], config: TransformerConfig) -> None:
    """At the end of a step: new scales for the fp8 layers of these chunks; all ranks of their stage must call."""
    operands = [operands for chunk in model for _, operands in fp8_layers(chunk)]
    groups = parallel_state.resolve(None)
    fp8.update_scales(operands, groups.tp_cp if config.tp_only_amax_red else groups.tp_dp_cp)
