"""Flat gradient (and parameter) buffers over a planned layout, and their reductions and gathers bucket by bucket."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.collectives import all_gather_single, reduce_scatter_single
from megatron.core.distributed.buckets import BufferLayout, plan_buffer
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.errors import TrainingError


class BufferType(Enum):
    """Which of the two flat tensors of a buffer is meant."""

    PARAM = 1
    GRAD = 2


class NanGradientError(TrainingError, AssertionError):
    """A gradient is NaN before it was reduced; AssertionError because v0.9 asserts."""


def shard_buffer(buffer: Tensor, data_parallel_world_size: int) -> list[Tensor]:
    """Cut a flat tensor into equal views, one per data-parallel rank; its length must divide."""
    assert buffer.numel() % data_parallel_world_size == 0, (
        f"{buffer.numel()} elements do not divide over {data_parallel_world_size} data-parallel ranks"
    )
    return list(buffer.view(data_parallel_world_size, -1).unbind())


class _ParamAndGradBucket:
    """The unit of communication: views of one stretch of a buffer, and the parameters that lie in it.

    `param_data` is None unless parameters live in the buffer too (distributed optimizer). `gradient_scaling_factor` is
    applied before the reduction. `offset` counts from the start of the buffer, in elements.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        param_data: Tensor | None,
        grad_data: Tensor,
        offset: int,
        numel_unpadded: int,
        gradient_scaling_factor: float,
        bucket_id: int,
        names: Sequence[str],
    ) -> None:
        self.params_list = list(params)
        self.params = set(params)
        self.param_data = param_data
        self.grad_data = grad_data
        self.offset = offset
        self.numel_unpadded = numel_unpadded
        self.gradient_scaling_factor = gradient_scaling_factor
        self.bucket_id = bucket_id
        self.names = list(names)


class _ParamAndGradBucketGroup:
    """Buckets that are reduced, and gathered, at the same moment: when the last of their parameters is ready.

    With overlap the collectives run in the background from `start_*` to `finish_*`; without, `finish_grad_sync` does
    everything. All ranks of the data-parallel group must call in the same order.
    """

    def __init__(
        self,
        buckets: list[_ParamAndGradBucket],
        ddp_config: DistributedDataParallelConfig,
        data_parallel_group: ProcessGroup | None,
        data_parallel_world_size: int,
    ) -> None:
        self.buckets = buckets
        self.ddp_config = ddp_config
        self.data_parallel_group = data_parallel_group
        self.data_parallel_world_size = data_parallel_world_size
        self.data_parallel_rank = 0 if data_parallel_group is None else data_parallel_group.rank()
        # A parameter marked `idle` takes part in no computation: its gradient stays zero and is not waited for.
        self.params = {
            param for bucket in buckets for param in bucket.params_list if not getattr(param, "idle", False)
        }
        self.params_with_grad: set[torch.nn.Parameter] = set()
        self.is_last_microbatch = True
        self.next_param_gather_bucket_group: _ParamAndGradBucketGroup | None = None
        self.param_gather_dispatched = False
        self._param_handles: list[dist.Work] = []
        self._grad_handles: list[dist.Work] = []
        self._grad_sync_started = False
        self._nan_flags: Tensor | None = None
        self._reduce_op = dist.ReduceOp.AVG if ddp_config.average_in_collective else dist.ReduceOp.SUM

    def reset(self) -> None:
        """Forget which gradients have arrived; called when the buffers are zeroed."""
        for param in self.params:
            param.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        self.params_with_grad = set()
        self.is_last_microbatch = True
        self._grad_sync_started = False

    # Gradients ----------------------------------------------------------------------------------------------------

    def check_for_nan_in_grad(self) -> None:
        """Raise NanGradientError, naming rank and parameter, if a local gradient is NaN (inf passes)."""
        self._note_nans()
        self._raise_noted_nans()

    def _note_nans(self) -> None:
        norms = torch._foreach_norm([bucket.grad_data for bucket in self.buckets], 2.0)
        self._nan_flags = torch.stack([norm.isnan() for norm in norms])

    def _raise_noted_nans(self) -> None:
        flags, self._nan_flags = self._nan_flags, None
        if flags is not None:
            device.raise_later(flags.any(), self._nan_error)

    def _nan_error(self) -> NanGradientError:
        culprits = [
            name
            for bucket in self.buckets
            for name, param in zip(bucket.names, bucket.params_list)
            if param.main_grad.isnan().any()  # type: ignore[attr-defined]
        ]
        if not culprits:  # looked at after the step, when gradients are zero again
            culprits = [name for bucket in self.buckets for name in bucket.names]
        rank = dist.get_rank() if dist.is_initialized() else 0
        return NanGradientError(
            ", ".join(culprits[:5]) + (f" and {len(culprits) - 5} more" if len(culprits) > 5 else ""),
            f"the gradient is NaN on rank {rank}, before it was reduced over data-parallel ranks",
            "look for a diverging loss (lower --lr) or a broken sample; "
            "--no-check-for-nan-in-loss-and-grad trains on regardless",
        )

    def start_grad_sync(self) -> None:
        """Scale the buckets and reduce them: to every rank, or each rank's part (distributed optimizer).

        Returns at once with overlap_grad_reduce.
        """
        assert not self._grad_sync_started, (
            "the gradients of this bucket group are already being reduced: start_grad_sync() was called twice"
        )
        self._grad_sync_started = True
        overlapped = self.ddp_config.overlap_grad_reduce
        if self.ddp_config.check_for_nan_in_grad:
            self._note_nans()
            if self.buckets[0].grad_data.device.type == "cpu":
                self._raise_noted_nans()  # on an accelerator asking now would stall backward: finish asks
        for bucket in self.buckets:
            if bucket.gradient_scaling_factor != 1.0:
                bucket.grad_data.mul_(bucket.gradient_scaling_factor)
        if self.data_parallel_world_size == 1:
            return
        for bucket in self.buckets:
            if self.ddp_config.use_distributed_optimizer:
                handle = reduce_scatter_single(
                    shard_buffer(bucket.grad_data, self.data_parallel_world_size)[self.data_parallel_rank],
                    bucket.grad_data,
                    op=self._reduce_op,
                    group=self.data_parallel_group,
                    async_op=overlapped,
                )
            else:
                handle = dist.all_reduce(
                    bucket.grad_data, op=self._reduce_op, group=self.data_parallel_group, async_op=overlapped
                )
            if overlapped:
                self._grad_handles.append(handle)

    def finish_grad_sync(self) -> None:
        """Return when the gradients are reduced. With overlap every parameter must have had a gradient."""
        if not self.ddp_config.overlap_grad_reduce or not self.params:
            self.start_grad_sync()
        elif not self._grad_sync_started:
            missing = [
                name
                for bucket in self.buckets
                for name, param in zip(bucket.names, bucket.params_list)
                if param in self.params and param not in self.params_with_grad
            ]
            raise AssertionError(
                f"the reduction of a bucket group was never started: {len(missing)} of {len(self.params)} parameters "
                f"got no gradient in the last microbatch ({', '.join(missing[:5])}); "
                "train without --overlap-grad-reduce or give every parameter a gradient"
            )
        for handle in self._grad_handles:
            handle.wait()
        self._grad_handles = []
        self._grad_sync_started = False
        self._raise_noted_nans()

    def register_grad_ready(self, param: torch.nn.Parameter) -> None:
        """Note that a parameter's gradient is complete; the last one of the last microbatch starts the reduction."""
        assert self.ddp_config.overlap_grad_reduce, "gradients are only registered with overlap_grad_reduce"
        if not self.is_last_microbatch:
            return
        assert param in self.params, "the parameter does not belong to this bucket group"
        assert param not in self.params_with_grad, (
            "a parameter's gradient was completed twice in the last microbatch: zero_grad_buffer() was not called, "
            "or a microbatch before it ran outside no_sync()"
        )
        self.params_with_grad.add(param)
        if len(self.params_with_grad) == len(self.params):
            self.start_grad_sync()

    # Parameters (distributed optimizer) ---------------------------------------------------------------------------

    def mark_params_stale(self) -> None:
        """Say that only this rank's part of the parameters is up to date, so that the next forward gathers them."""
        self.param_gather_dispatched = False

    def start_param_sync(self, force_sync: bool = False) -> None:
        """Gather the parameters from the ranks that own them; in the background with overlap_param_gather.

        `force_sync` returns only when they are there, waiting for a gather under way instead of starting another.
        """
        assert self.ddp_config.use_distributed_optimizer, (
            "only the distributed optimizer's parameters are gathered"
        )
        if self._param_handles:
            assert force_sync, "the parameters of this bucket group are already being gathered"
            self._wait_for_params()
            return
        background = self.ddp_config.overlap_param_gather and not force_sync
        self.param_gather_dispatched = True
        if self.data_parallel_world_size == 1:
            return
        for bucket in self.buckets:
            assert bucket.param_data is not None, "a bucket without parameters cannot be gathered"
            handle = all_gather_single(
                bucket.param_data,
                shard_buffer(bucket.param_data, self.data_parallel_world_size)[self.data_parallel_rank],
                group=self.data_parallel_group,
                async_op=background,
            )
            if background:
                self._param_handles.append(handle)

    def finish_param_sync(self, skip_next_bucket_dispatch: bool = False) -> None:
        """Return when this group's parameters are there, and start gathering the group that forward needs next."""
        if self.param_gather_dispatched and not self._param_handles:
            return
        if not self.param_gather_dispatched:
            self.start_param_sync()
        self._wait_for_params()
        following = self.next_param_gather_bucket_group
        if following is not None and not skip_next_bucket_dispatch and not following.param_gather_dispatched:
            following.start_param_sync()

    def _wait_for_params(self) -> None:
        for handle in self._param_handles:
            handle.wait()
        self._param_handles = []


def layout_of(
    params: Sequence[torch.nn.Parameter], bucket_size: int | None, data_parallel_size: int, sharded: bool
) -> BufferLayout:
    """The layout of a buffer for these parameters; arguments as in `plan_buffer`."""
    return plan_buffer(
        [param.numel() for param in params],
        bucket_size=bucket_size,
        data_parallel_size=data_parallel_size,
        sharded=sharded,
        own_bucket={i for i, param in enumerate(params) if getattr(param, "shared_embedding", False)},
    )


class _ParamAndGradBuffer:
    """Gradients of one dtype in one flat tensor, cut into buckets; with the distributed optimizer also parameters.

    `param.main_grad` becomes a view of `grad_data`, and with the distributed optimizer `param.data` one of
    `param_data`, at the same offset (fp8 parameters lie there as bytes, a `param_dtype` of uint8). `param_index_map` is
    parameter -> (start, end, bucket), in elements. A `bucket_size` of None means a single bucket.
    """

    def __init__(
        self,
        ddp_config: DistributedDataParallelConfig,
        param_dtype: torch.dtype,
        grad_dtype: torch.dtype,
        params: list[torch.nn.Parameter],
        data_parallel_group: ProcessGroup | None,
        bucket_size: int | None,
        param_to_name: dict[torch.nn.Parameter, str],
        gradient_scaling_factor: float,
    ) -> None:
        assert len(set(params)) == len(params), "a parameter may appear only once in a buffer"
        self.ddp_config = ddp_config
        self.params = params
        self.param_dtype = param_dtype
        self.grad_dtype = grad_dtype
        self.data_parallel_group = data_parallel_group
        self.data_parallel_world_size = 1 if data_parallel_group is None else data_parallel_group.size()
        self.gradient_scaling_factor = gradient_scaling_factor
        self.layout = layout_of(
            params, bucket_size, self.data_parallel_world_size, ddp_config.use_distributed_optimizer
        )
        self.numel = self.layout.numel
        self.numel_unpadded = self.layout.numel_unpadded
        self.param_index_map = {
            param: (slot.start, slot.end, slot.bucket) for param, slot in zip(params, self.layout.slots)
        }
        self.bucket_indices = [(bucket.start, bucket.end) for bucket in self.layout.buckets]
        device = params[0].device
        self.grad_data = torch.zeros(self.numel, dtype=grad_dtype, device=device, requires_grad=False)
        self.param_data: Tensor | None = None
        if ddp_config.use_distributed_optimizer:
            self.param_data = torch.zeros(self.numel, dtype=param_dtype, device=device, requires_grad=False)
        for param, slot in zip(params, self.layout.slots):
            param.main_grad = self.grad_data[slot.start : slot.end].view(param.shape)  # type: ignore[attr-defined]
            if self.param_data is not None:
                home = self.param_data[slot.start : slot.end].view(param.dtype).view(param.shape)
                home.copy_(param.detach())
                param.data = home
        self.buckets = [
            _ParamAndGradBucket(
                params=[params[i] for i in plan.params],
                param_data=None if self.param_data is None else self.param_data[plan.start : plan.end],
                grad_data=self.grad_data[plan.start : plan.end],
                offset=plan.start,
                numel_unpadded=plan.numel_unpadded,
                gradient_scaling_factor=gradient_scaling_factor,
                bucket_id=bucket_id,
                names=[param_to_name[params[i]] for i in plan.params],
            )
            for bucket_id, plan in enumerate(self.layout.buckets)
        ]
        self.param_to_bucket = {param: bucket for bucket in self.buckets for param in bucket.params_list}

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Multiply all gradients in place; a tensor factor is not waited for."""
        self.grad_data.mul_(scaling_factor)

    def reset(self) -> None:
        """Zero all gradients."""
        self.grad_data.zero_()


class ParamAndGradBuffer(_ParamAndGradBuffer):
    """The buffer under the name by which other code may construct it."""


def partition_buckets(
    buffers: Sequence[_ParamAndGradBuffer], force_single_bucket_group: bool = False
) -> list[_ParamAndGradBucketGroup]:
    """Bundle the buckets of buffers that share a data-parallel group into bucket groups.

    Every bucket is a group of its own, unless all are forced into one, whose collectives then run together.
    """
    if not buffers:
        return []
    first = buffers[0]
    assert all(buffer.data_parallel_group is first.data_parallel_group for buffer in buffers), (
        "buffers of different data-parallel groups cannot be partitioned together"
    )
    buckets = [bucket for buffer in buffers for bucket in buffer.buckets]
    return [
        _ParamAndGradBucketGroup(
            together, first.ddp_config, first.data_parallel_group, first.data_parallel_world_size
        )
        for together in ([buckets] if force_single_bucket_group else [[bucket] for bucket in buckets])
    ]
