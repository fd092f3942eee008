"""The data-parallel wrapper of a model chunk: gradients into flat buffers, reduced over the replicas."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.config_logger import has_config_logger_enabled, log_config_to_disk
from megatron.core.distributed.buckets import default_bucket_size
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import (
    _ParamAndGradBucketGroup,
    _ParamAndGradBuffer,
    partition_buckets,
)
from megatron.core.errors import InvariantError
from megatron.core.fp8 import weights as fp8_weights
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import keep_weights_in_fp8
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)


class DistributedDataParallel(MegatronModule):
    """Wraps one model chunk so that backward accumulates into `param.main_grad` and replicas exchange their sums.

    `buffers` hold dense parameters and are reduced over the data- and context-parallel ranks,
    `expert_parallel_buffers` those marked `allreduce=False`, reduced over the replicas of the same experts. Both are
    lists of buffers, one per (parameter dtype, gradient dtype). A training step is: zero_grad_buffer(); forward and
    backward of every microbatch, all but the last inside no_sync(); finish_grad_sync().
    """

    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        module: torch.nn.Module,
        disable_bucketing: bool = False,
        *,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if has_config_logger_enabled(config):
            log_config_to_disk(config, locals())
        self.module = module
        self.ddp_config = ddp_config
        self.pg_collection = parallel_state.resolve(pg_collection)
        if config.calculate_per_token_loss and ddp_config.average_in_collective:
            raise InvariantError(
                "--calculate-per-token-loss --ddp-average-in-collective",
                "the first divides summed gradients by the number of tokens, the second has them averaged",
                "drop --ddp-average-in-collective",
            )
        if ddp_config.overlap_param_gather and not ddp_config.use_distributed_optimizer:
            raise InvariantError(
                "--overlap-param-gather",
                "parameters are only gathered after updates of the distributed optimizer",
                "add --use-distributed-optimizer",
            )
        if ddp_config.fp8_param_gather:
            if not ddp_config.use_distributed_optimizer:
                raise InvariantError(
                    "--fp8-param-gather",
                    "parameters are only gathered after updates of the distributed optimizer",
                    "add --use-distributed-optimizer",
                )
            keep_weights_in_fp8(module)
        self.overlap_param_gather_with_optimizer_step = False
        data_parallel_size = self.pg_collection.size("dp_cp")
        self.bucket_size: int | None = ddp_config.bucket_size or default_bucket_size(data_parallel_size)
        # Buckets exist to overlap; later stages have their gradients late anyway and start all reductions at once.
        single_bucket = (
            disable_bucketing or not ddp_config.overlap_grad_reduce or self.pg_collection.rank("pp") > 0
        )
        if single_bucket:
            self.bucket_size = None

        self.param_to_name = {param: name for name, param in module.named_parameters() if param.requires_grad}
        dense = [param for param in self.param_to_name if getattr(param, "allreduce", True)]
        expert = [param for param in self.param_to_name if not getattr(param, "allreduce", True)]
        expert_share = self.pg_collection.size("dp_modulo_ep_cp") / data_parallel_size
        self.buffers: list[_ParamAndGradBuffer] = self._allocate(  # type: ignore[assignment]
            dense, self.pg_collection.dp_cp, average_factor=1.0
        )
        self.expert_parallel_buffers = self._allocate(
            expert, self.pg_collection.dp_modulo_ep_cp, average_factor=expert_share
        )
        self.bucket_groups = partition_buckets(self.buffers, force_single_bucket_group=disable_bucketing)
        self.expert_parallel_bucket_groups = partition_buckets(
            self.expert_parallel_buffers, force_single_bucket_group=disable_bucketing
        )
        self.param_to_bucket_group = {
            param: group
            for group in self._all_bucket_groups()
            for bucket in group.buckets
            for param in bucket.params_list
        }
        self._log_buckets()
        if ddp_config.overlap_param_gather:
            self._link_param_gathers()

        self._hook_owners: list[Any] = []
        for param in self.param_to_name:
            param.grad_added_to_main_grad = False  # type: ignore[attr-defined]
            # The hook sits on autograd's accumulation node, which also runs when a kernel has added the gradient
            # itself and passes none on; the node must be kept alive.
            accumulation: Any = param.expand_as(param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
            accumulation.register_hook(self._make_backward_post_hook(param))
            self._hook_owners.append(accumulation)
        self.remove_forward_pre_hook_handles: dict[torch.nn.Module, Any] = {}
        if ddp_config.overlap_param_gather:
            self.enable_forward_pre_hook()

    def _allocate(
        self, params: list[torch.nn.Parameter], group: ProcessGroup | None, average_factor: float
    ) -> list[_ParamAndGradBuffer]:
        """One buffer per (parameter dtype, gradient dtype), in order of first appearance."""
        if self.config.calculate_per_token_loss:
            factor = 1.0
        elif self.ddp_config.average_in_collective:
            # An expert's group averages over fewer ranks than the batch is spread over.
            factor = average_factor
        else:
            factor = 1.0 / self.pg_collection.size("dp_cp")
        alike: dict[tuple[torch.dtype, torch.dtype], list[torch.nn.Parameter]] = {}
        for param in params:
            grad_dtype = fp8_weights.dtype_of(param)
            # Bytes are what collectives of every backend take.
            param_dtype = param.dtype if fp8_weights.of(param) is None else torch.uint8
            if self.ddp_config.grad_reduce_in_fp32:
                grad_dtype = torch.promote_types(grad_dtype, torch.float32)
            alike.setdefault((param_dtype, grad_dtype), []).append(param)
        return [
            _ParamAndGradBuffer(
                self.ddp_config,
                param_dtype,
                grad_dtype,
                same,
                group,
                self.bucket_size,
                self.param_to_name,
                factor,
            )
            for (param_dtype, grad_dtype), same in alike.items()
        ]

    def _all_bucket_groups(self) -> list[_ParamAndGradBucketGroup]:
        return [*self.bucket_groups, *self.expert_parallel_bucket_groups]

    def _all_buffers(self) -> list[_ParamAndGradBuffer]:
        return [*self.buffers, *self.expert_parallel_buffers]

    def _log_buckets(self) -> None:
        """Tell how gradients are cut up: what an overlap can hide depends on it."""
        for buffer in self._all_buffers():
            sizes = ", ".join(str(bucket.grad_data.numel()) for bucket in buffer.buckets)
            log_single_rank(
                logger,
                logging.INFO,
                f"gradients of {len(buffer.params)} {buffer.param_dtype} parameters are reduced in {buffer.grad_dtype}, "
                f"buckets of {sizes} elements over {buffer.data_parallel_world_size} ranks",
            )

    def _link_param_gathers(self) -> None:
        """Let each group know which one forward needs next: buckets fill from the model's end, so the one before."""
        for groups in (self.bucket_groups, self.expert_parallel_bucket_groups):
            for later, earlier in pairwise(groups):
                earlier.next_param_gather_bucket_group = later

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Arguments and result of the wrapped module."""
        return self.module(*inputs, **kwargs)

    # Gradients ----------------------------------------------------------------------------------------------------

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        overlapped = self.ddp_config.overlap_grad_reduce
        bucket_group = self.param_to_bucket_group[param]

        def accumulate(*unused: Any) -> None:
            added = param.grad_added_to_main_grad  # type: ignore[attr-defined]
            if param.grad is not None:
                if not added or getattr(param, "zero_out_wgrad", False):
                    param.main_grad.add_(param.grad)  # type: ignore[attr-defined]
                param.grad = None
            else:
                assert added or not overlapped, (
                    f"{self.param_to_name[param]} got no gradient, which --overlap-grad-reduce cannot wait for"
                )
            if overlapped:
                bucket_group.register_grad_ready(param)

        return accumulate

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it backward only accumulates: for every microbatch but the last."""
        for group in self._all_bucket_groups():
            group.is_last_microbatch = False
        try:
            yield
        finally:
            for group in self._all_bucket_groups():
                group.is_last_microbatch = True

    def start_grad_sync(self, *unused: Any) -> None:
        """Start reducing all gradients (in the background with overlap_grad_reduce)."""
        for group in self._all_bucket_groups():
            group.start_grad_sync()

    def finish_grad_sync(self) -> None:
        """Return when all gradients are reduced."""
        for group in self._all_bucket_groups():
            group.finish_grad_sync()

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Multiply all gradients in place."""
        for buffer in self._all_buffers():
            buffer.scale_gradients(scaling_factor)

    def zero_grad_buffer(self) -> None:
        """Zero all gradients and forget which have arrived; at the start of every step."""
        for buffer in self._all_buffers():
            buffer.reset()
        for group in self._all_bucket_groups():
            group.reset()

    # Parameters ---------------------------------------------------------------------------------------------------

    def _make_forward_pre_hook(self, groups: list[_ParamAndGradBucketGroup]) -> Callable[..., None]:
        def wait_for_params(*unused: Any) -> None:
            chained = not (
                self.ddp_config.align_param_gather or self.overlap_param_gather_with_optimizer_step
            )
            for group in groups:
                group.finish_param_sync(skip_next_bucket_dispatch=not chained)

        return wait_for_params

    def enable_forward_pre_hook(self) -> None:
        """Have every submodule wait for the gather of its own parameters before it runs (overlap_param_gather)."""
        assert self.ddp_config.overlap_param_gather, (
            "parameters are only gathered in forward with overlap_param_gather"
        )
        assert not self.remove_forward_pre_hook_handles, "the forward hooks are already enabled"
        for module in self.module.modules():
            own = {
                self.param_to_bucket_group[p]: None
                for p in module.parameters(recurse=False)
                if p.requires_grad
            }
            if own:
                self.remove_forward_pre_hook_handles[module] = module.register_forward_pre_hook(
                    self._make_forward_pre_hook(list(own))
                )

    def disable_forward_pre_hook(self) -> None:
        """Remove the hooks and complete all gathers, for code that reads parameters outside forward."""
        assert self.ddp_config.overlap_param_gather, (
            "parameters are only gathered in forward with overlap_param_gather"
        )
        assert self.remove_forward_pre_hook_handles, "the forward hooks are already disabled"
        for handle in self.remove_forward_pre_hook_handles.values():
            handle.remove()
        self.remove_forward_pre_hook_handles = {}
        self.start_param_sync(force_sync=True)

    def start_param_sync(self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False) -> None:
        """Gather all parameters; in the background with overlap_param_gather unless `force_sync`.

        A chunk whose gather belongs to the optimizer step ignores calls without `force_dispatch` or `force_sync`.
        """
        if self.overlap_param_gather_with_optimizer_step and not (force_sync or force_dispatch):
            return
        for group in self._all_bucket_groups():
            group.start_param_sync(force_sync=force_sync)

    def broadcast_params(self) -> None:
        """Give all replicas the parameters of the first one. All ranks must call."""
        for param in self.module.parameters():
            replicated = getattr(param, "allreduce", True)
            group = self.pg_collection.dp_cp if replicated else self.pg_collection.dp_modulo_ep_cp
            if group is not None and group.size() > 1:
                values = fp8_weights.values_of(param)
                dist.broadcast(values, src=dist.get_global_rank(group, 0), group=group)
                if (kept := fp8_weights.of(param)) is not None:
                    kept.assign(values)

    # State: the wrapper adds no level to the names ----------------------------------------------------------------

    def state_dict(  # type: ignore[override]
        self, prefix: str = "", keep_vars: bool = False, *, destination: Any = None
    ) -> dict[str, Any]:
        """The wrapped module's state dict."""
        return self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """The wrapped module's state dict for a checkpoint."""
        save_view: Any = self.module.state_dict_for_save_checkpoint
        return save_view(prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> Any:  # type: ignore[override]
        """Load into the wrapped module; returns torch's missing and unexpected keys."""
        return self.module.load_state_dict(state_dict, strict=strict)
