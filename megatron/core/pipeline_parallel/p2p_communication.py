"""Send and receive activations and their gradients between pipeline stages.

`start` hands a group of transfers to the backend and returns at once; everything else here is that call under the
classic names. On gloo each transfer is its own tagged message; on NCCL, which matches by order, a group is one
`batch_isend_irecv`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.errors import InvariantError, ScheduleError
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.timers import timed

T = TypeVar("T")
Shape = Sequence[int] | torch.Size

_TAG_FORWARD, _TAG_BACKWARD = 0, 1
_SHAPE_TAG_OFFSET = 1 << 24  # shape messages travel beside their payload under their own tag
_MAX_DIMS = 8


class Send(NamedTuple):
    """`tensor` goes to global rank `peer`."""

    tensor: Tensor
    peer: int
    tag: int


class Receive(NamedTuple):
    """A tensor of `shape` comes from global rank `peer`."""

    shape: Shape
    peer: int
    tag: int


class Transfer:
    """Transfers under way: `received` holds the tensors asked for, in order, valid after `wait()`."""

    def __init__(
        self,
        received: list[Tensor],
        receiving: list[dist.Work],
        sending: list[dist.Work],
        payloads: list[Tensor],
    ) -> None:
        self.received = received
        self._receiving, self._sending, self._payloads = receiving, sending, payloads

    def wait(self) -> list[Tensor]:
        """Block the host (gloo) or the current stream (NCCL) until everything has arrived; returns `received`."""
        for work in self._receiving:
            work.wait()
        self._receiving = []
        return self.received

    def sent(self) -> None:
        """Wait until the sent tensors may be overwritten, and let them go."""
        for work in self._sending:
            work.wait()
        self._sending, self._payloads = [], []


def timer_name(sent: Collection[str], received: Collection[str]) -> str:
    """v0.9's name for the time of an exchange that sends and receives these kinds: "forward", "backward" or both."""
    if len(sent) > 1 or len(received) > 1:
        return "forward-backward-send-forward-backward-recv"
    return "-".join([*(f"{kind}-send" for kind in sent), *(f"{kind}-recv" for kind in received)])


def start(
    sends: Sequence[Send],
    receives: Sequence[Receive],
    *,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    device: torch.device,
    announce_shapes: bool = False,
) -> Transfer:
    """Begin a group of transfers over the pipeline group.

    Received tensors have `dtype`, live on `device` and require grad, so that they can be the leaves of a microbatch's
    backward. With `announce_shapes` (`--variable-seq-lengths`) senders tell each shape first and the shapes of `receives`
    are not used. All peers named must call with the matching transfers and the same `announce_shapes`.
    """
    # A detached alias survives the emptying of the original by `deallocate_output_tensor`.
    payloads = [send.tensor.detach().contiguous() for send in sends]
    shapes = [receive.shape for receive in receives]
    if announce_shapes:
        shapes = _negotiate(sends, receives, group, device)
    received = [torch.empty(tuple(s), dtype=dtype, device=device, requires_grad=True) for s in shapes]
    into = [tensor.detach() for tensor in received]
    receiving, sending = _issue(sends, payloads, receives, into, group)
    return Transfer(received, receiving, sending, payloads)


def _negotiate(
    sends: Sequence[Send], receives: Sequence[Receive], group: dist.ProcessGroup, device: torch.device
) -> list[Shape]:
    """Exchange the shapes of a group of transfers, and wait for them."""
    outgoing = [_encode(send.tensor.shape, device) for send in sends]
    incoming = [torch.empty(_MAX_DIMS + 1, dtype=torch.int64, device=device) for _ in receives]
    receiving, sending = _issue(
        [s._replace(tag=s.tag + _SHAPE_TAG_OFFSET) for s in sends],
        outgoing,
        [r._replace(tag=r.tag + _SHAPE_TAG_OFFSET) for r in receives],
        incoming,
        group,
    )
    for work in (*receiving, *sending):
        work.wait()
    return [_decode(code) for code in incoming]


def _encode(shape: torch.Size, device: torch.device) -> Tensor:
    padded = [len(shape), *shape] + [0] * (_MAX_DIMS - len(shape))
    return torch.tensor(padded, dtype=torch.int64, device=device)


def _decode(code: Tensor) -> list[int]:
    dims, *sizes = code.tolist()
    return sizes[:dims]


def _issue(
    sends: Sequence[Send],
    payloads: list[Tensor],
    receives: Sequence[Receive],
    into: list[Tensor],
    group: dist.ProcessGroup,
) -> tuple[list[dist.Work], list[dist.Work]]:
    """Post every transfer; returns the handles of the receives and of the sends."""
    if dist.get_backend(group) == "gloo":
        receiving = [
            dist.irecv(tensor, src=r.peer, group=group, tag=r.tag) for r, tensor in zip(receives, into)
        ]
        sending = [
            dist.isend(tensor, dst=s.peer, group=group, tag=s.tag) for s, tensor in zip(sends, payloads)
        ]
        return [w for w in receiving if w is not None], [w for w in sending if w is not None]
    operations = [dist.P2POp(dist.isend, tensor, s.peer, group) for s, tensor in zip(sends, payloads)]
    operations += [dist.P2POp(dist.irecv, tensor, r.peer, group) for r, tensor in zip(receives, into)]
    works = dist.batch_isend_irecv(operations) if operations else []
    return works, works


# ---- the classic names -------------------------------------------------------------------------------------------------


def _exchange(
    config: ModelParallelConfig,
    *,
    to_next: Tensor | None = None,
    to_prev: Tensor | None = None,
    from_prev: Shape | None = None,
    from_next: Shape | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """One group of neighbour transfers, waited for; returns what came from the previous and from the next stage."""
    directions = ("forward", to_next, from_prev), ("backward", to_prev, from_next)
    sent = [kind for kind, tensor, _ in directions if tensor is not None]
    expected = [kind for kind, _, shape in directions if shape is not None]
    if not sent and not expected:
        return None, None
    with timed(config, timer_name(sent, expected), 2):
        transfer = _start_with_neighbours(
            config, to_next=to_next, to_prev=to_prev, from_prev=from_prev, from_next=from_next
        )
        received = transfer.wait()
        transfer.sent()
    return (
        received.pop(0) if from_prev is not None else None,
        received.pop(0) if from_next is not None else None,
    )


def _start_with_neighbours(
    config: ModelParallelConfig,
    *,
    to_next: Tensor | None = None,
    to_prev: Tensor | None = None,
    from_prev: Shape | None = None,
    from_next: Shape | None = None,
) -> Transfer:
    before = only(parallel_state.get_pipeline_model_parallel_prev_rank())
    after = only(parallel_state.get_pipeline_model_parallel_next_rank())
    sends = [Send(to_next, after, _TAG_FORWARD)] if to_next is not None else []
    sends += [Send(to_prev, before, _TAG_BACKWARD)] if to_prev is not None else []
    receives = [Receive(from_prev, before, _TAG_FORWARD)] if from_prev is not None else []
    receives += [Receive(from_next, after, _TAG_BACKWARD)] if from_next is not None else []
    return start(
        sends,
        receives,
        group=pipeline_group(),
        dtype=pipeline_dtype(config),
        device=device.current(),
        announce_shapes=config.variable_seq_lengths,
    )


def only(one_or_many: T | list[T]) -> T:
    """The rank or group of this rank's only pipeline; InvariantError where an encoder rank feeds several."""
    if isinstance(one_or_many, list):
        raise InvariantError(
            "this rank", "belongs to several pipelines", "encoder and decoder must have equal tensor sizes"
        )
    return one_or_many


def pipeline_group() -> dist.ProcessGroup:
    """The pipeline of this rank; InvariantError where an encoder rank feeds several decoder pipelines."""
    return only(parallel_state.get_pipeline_model_parallel_group())


def pipeline_dtype(config: ModelParallelConfig) -> torch.dtype:
    """What stages exchange; raises ScheduleError if the config does not say."""
    if config.pipeline_dtype is None:
        raise ScheduleError("config.pipeline_dtype", "is None", "set it to the dtype that stages exchange")
    return config.pipeline_dtype


def recv_forward(tensor_shape: Shape, config: ModelParallelConfig) -> Tensor | None:
    """Activation from the previous stage; None on the first stage."""
    if parallel_state.is_pipeline_first_stage():
        return None
    return _exchange(config, from_prev=tensor_shape)[0]


def recv_backward(tensor_shape: Shape, config: ModelParallelConfig) -> Tensor | None:
    """Gradient from the next stage; None on the last stage."""
    if parallel_state.is_pipeline_last_stage():
        return None
    return _exchange(config, from_next=tensor_shape)[1]


def send_forward(output_tensor: Tensor, config: ModelParallelConfig) -> None:
    """Activation to the next stage; nothing on the last stage."""
    if not parallel_state.is_pipeline_last_stage():
        _exchange(config, to_next=output_tensor)


def send_backward(input_tensor_grad: Tensor, config: ModelParallelConfig) -> None:
    """Gradient to the previous stage; nothing on the first stage."""
    if not parallel_state.is_pipeline_first_stage():
        _exchange(config, to_prev=input_tensor_grad)


def send_forward_recv_backward(
    output_tensor: Tensor, tensor_shape: Shape, config: ModelParallelConfig
) -> Tensor | None:
    """Activation to, and gradient from, the next stage; None on the last stage."""
    if parallel_state.is_pipeline_last_stage():
        return None
    return _exchange(config, to_next=output_tensor, from_next=tensor_shape)[1]


def send_backward_recv_forward(
    input_tensor_grad: Tensor, tensor_shape: Shape, config: ModelParallelConfig
) -> Tensor | None:
    """Gradient to, and activation from, the previous stage; None on the first stage."""
    if parallel_state.is_pipeline_first_stage():
        return None
    return _exchange(config, to_prev=input_tensor_grad, from_prev=tensor_shape)[0]


def send_forward_recv_forward(
    output_tensor: Tensor | None,
    recv_prev: bool,
    tensor_shape: Shape,
    config: ModelParallelConfig,
    overlap_p2p_comm: bool = False,
) -> Tensor | tuple[Tensor | None, Transfer] | None:
    """Activation to the next stage and from the previous one; with overlap also the transfer to wait for."""
    wanted = tensor_shape if recv_prev else None
    if overlap_p2p_comm:
        transfer = _start_with_neighbours(config, to_next=output_tensor, from_prev=wanted)
        return (transfer.received[0] if recv_prev else None), transfer
    return _exchange(config, to_next=output_tensor, from_prev=wanted)[0]


def send_backward_recv_backward(
    input_tensor_grad: Tensor | None,
    recv_next: bool,
    tensor_shape: Shape,
    config: ModelParallelConfig,
    overlap_p2p_comm: bool = False,
) -> Tensor | tuple[Tensor | None, Transfer] | None:
    """Gradient to the previous stage and from the next one; with overlap also the transfer to wait for."""
    wanted = tensor_shape if recv_next else None
    if overlap_p2p_comm:
        transfer = _start_with_neighbours(config, to_prev=input_tensor_grad, from_next=wanted)
        return (transfer.received[0] if recv_next else None), transfer
    return _exchange(config, to_prev=input_tensor_grad, from_next=wanted)[1]


def send_forward_backward_recv_forward_backward(
    output_tensor: Tensor | None,
    input_tensor_grad: Tensor | None,
    recv_prev: bool,
    recv_next: bool,
    tensor_shape: Shape,
    config: ModelParallelConfig,
) -> tuple[Tensor | None, Tensor | None]:
    """Everything with both neighbours at once: (activation from the previous stage, gradient from the next)."""
    return _exchange(
        config,
        to_next=output_tensor,
        to_prev=input_tensor_grad,
        from_prev=tensor_shape if recv_prev else None,
        from_next=tensor_shape if recv_next else None,
    )
