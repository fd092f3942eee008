"""Run one stage's plan: the only place that turns operations into computation and messages.

The plan (plan.py) says in which order microbatches go forward and backward; the executor keeps their tensors, issues the
plan's exchanges, opens the window in which gradient reduction may start, and decides nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import p2p_communication as p2p
from megatron.core.pipeline_parallel.microbatch import (
    Tensors,
    backward_step,
    check_first_val_step,
    deallocate_output_tensor,
    forward_step,
)
from megatron.core.pipeline_parallel.plan import Geometry, Message, Op, Plan, exchanges, last_backwards
from megatron.core.timers import timed
from megatron.core.transformer.transformer_config import TransformerConfig

#: Shapes of the tensors of one message, given the pipeline stage that sends it.
ShapesOf = Callable[[int], list[tuple[int, ...]]]


@dataclass
class Job:
    """What one call of a schedule works on; field names follow the arguments of the schedule functions."""

    forward_step_func: Callable[..., Any]
    data_iterators: Sequence[Any]
    chunks: Sequence[torch.nn.Module]
    config: TransformerConfig
    model_type: ModelType
    num_microbatches: int
    plan: Plan
    geometry: Geometry
    shapes_from: ShapesOf
    forward_only: bool = False
    collect_non_loss_data: bool = False
    first_val_step: bool | None = None
    encoder_decoder_xattn: bool = False


@dataclass
class _InFlight:
    """Tensors of microbatches whose backward has not run yet, by (microbatch, chunk)."""

    inputs: dict[tuple[int, int], Tensors] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Tensors] = field(default_factory=dict)


def run(job: Job) -> tuple[list[Any], Tensor]:
    """Execute `job.plan` on this stage; all stages of the pipeline must call with the same geometry.

    Returns what the loss function reported per microbatch (empty away from the last stage) and the number of tokens.
    """
    link = _Link(job)
    windows = _GradSyncWindows(job)
    gathers = _ParamGathers(job)
    alive = _InFlight()
    reported: list[Any] = []
    num_tokens = torch.zeros((), dtype=torch.int, device=device.current())
    held = _partial_recompute_limit(job)
    interleaved = job.geometry.chunks > 1

    with windows:
        for index, op in enumerate(job.plan):
            link.issue(index)
            if interleaved:
                parallel_state.set_virtual_pipeline_model_parallel_rank(op.chunk)
            unit = (op.microbatch, op.chunk)
            arrived = link.take(op)
            if op.kind == "F":
                gathers.before_forward(op)
                output, tokens = forward_step(
                    job.forward_step_func,
                    job.data_iterators[op.chunk],
                    job.chunks[op.chunk],
                    job.num_microbatches,
                    arrived,
                    reported,
                    job.config,
                    job.collect_non_loss_data,
                    None if held is None else op.microbatch % held[0] >= held[1],
                    check_first_val_step(job.first_val_step, job.forward_only, op.microbatch == 0),
                    current_microbatch=op.microbatch,
                    encoder_decoder_xattn=job.encoder_decoder_xattn,
                )
                num_tokens += tokens.to(num_tokens.device)
                assert isinstance(output, list), "forward_step answers a list of inputs with a list"
                link.give(op, output)
                if not job.forward_only:
                    alive.inputs[unit], alive.outputs[unit] = arrived, output
            else:
                inputs = alive.inputs.pop(unit)
                with windows.backward_of(index, op):
                    grads = backward_step(
                        inputs, alive.outputs.pop(unit), arrived, job.model_type, job.config
                    )
                assert isinstance(grads, list), "backward_step answers a list of inputs with a list"
                link.give(op, _with_zeros(grads, inputs))
                windows.after_backward(index)
        link.issue(len(job.plan))
    if interleaved:
        parallel_state.set_virtual_pipeline_model_parallel_rank(0)
    return reported, num_tokens


def _with_zeros(grads: Tensors, inputs: Tensors) -> Tensors:
    """Gradients to send: an input that did not influence the loss still owes its sender a message."""
    return [torch.zeros_like(i) if g is None and i is not None else g for g, i in zip(grads, inputs)]


def _partial_recompute_limit(job: Job) -> tuple[int, int] | None:
    """(period, stored): in every `period` microbatches the first `stored` keep their activations, the rest recompute."""
    stored = job.config.num_microbatches_with_partial_activation_checkpoints
    if stored is None:
        return None
    return min(job.geometry.stages - job.geometry.stage, job.num_microbatches), stored


class _Link:
    """The messages of this stage: issues exchanges, hands inputs to operations, empties what was sent."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._geometry = job.geometry
        self._schedule = exchanges(job.plan, job.geometry)
        self._inbox: dict[Message, tuple[p2p.Transfer, slice]] = {}
        self._outbox: dict[Message, Tensors] = {}
        self._unfinished: p2p.Transfer | None = None
        self._ranks = dist.get_process_group_ranks(p2p.pipeline_group()) if job.geometry.stages > 1 else []

    def take(self, op: Op) -> Tensors:
        """The input of an operation: what a neighbour sent, or [None] at the ends of the pipeline."""
        message = self._geometry.received_by(op)
        if message is None:
            return [None]
        transfer, part = self._inbox.pop(message)
        return list(transfer.wait()[part])

    def give(self, op: Op, tensors: Tensors) -> None:
        """Keep what an operation produced until the next exchange takes it."""
        message = self._geometry.sent_by(op)
        if message is not None:
            self._outbox[message] = tensors

    def issue(self, index: int) -> None:
        """Start exchange `index` of the plan; wait for it at once unless p2p overlap is on."""
        call = self._schedule[index]
        if not call.sends and not call.receives:
            return
        config = self._job.config
        produced = {message: self._outbox.pop(message) for message in call.sends}
        sends = [
            p2p.Send(tensor, self._ranks[message.peer], self._tag(message, part))
            for message, tensors in produced.items()
            for part, tensor in enumerate(tensors)
            if tensor is not None
        ]
        receives: list[p2p.Receive] = []
        parts: dict[Message, slice] = {}
        for message in call.receives:
            # A gradient has the shapes of the activation that this stage sent; an activation those of its sender's.
            shapes = self._job.shapes_from(message.peer if message.kind == "F" else self._geometry.stage)
            parts[message] = slice(len(receives), len(receives) + len(shapes))
            source = self._ranks[message.peer]
            receives += [p2p.Receive(s, source, self._tag(message, part)) for part, s in enumerate(shapes)]
        with timed(config, p2p.timer_name(_directions(call.sends), _directions(call.receives)), 2):
            transfer = p2p.start(
                sends,
                receives,
                group=p2p.pipeline_group(),
                dtype=p2p.pipeline_dtype(config),
                device=device.current(),
                announce_shapes=config.variable_seq_lengths,
            )
            if not config.overlap_p2p_comm:
                transfer.wait()
        for message, part in parts.items():
            self._inbox[message] = (transfer, part)
        if self._unfinished is not None:
            self._unfinished.sent()
        self._unfinished = transfer
        if index == len(self._schedule) - 1:
            transfer.sent()
        for message, tensors in produced.items():
            if message.kind == "F" and not self._job.forward_only:
                deallocate_output_tensor(tensors[0], config.deallocate_pipeline_outputs)

    def _tag(self, message: Message, part: int) -> int:
        virtuals = self._geometry.last_virtual + 1
        unit = message.microbatch * virtuals + message.virtual
        return ((unit * 2 + (message.kind == "B")) * 2 + part) + 2


def _directions(messages: Iterable[Message]) -> set[str]:
    return {"forward" if message.kind == "F" else "backward" for message in messages}


class _GradSyncWindows(contextlib.AbstractContextManager["_GradSyncWindows"]):
    """When the data-parallel gradient reduction of a chunk may start.

    Hooks of the wrapped model reduce a bucket as soon as its gradients are complete, which is right only in a chunk's last
    backward; everywhere else `config.no_sync_func` holds them back. With `config.grad_sync_func` (aligned reductions) only
    the first stage reduces from hooks, the others launch chunk by chunk, later by their stage index, so that all stages
    of a pipeline communicate at the same time (spec: training, section 8.4).
    """

    def __init__(self, job: Job) -> None:
        config, geometry = job.config, job.geometry
        self._active = not job.forward_only and config.no_sync_func is not None
        self._no_sync = _as_list(config.no_sync_func, len(job.chunks)) if self._active else []
        self._explicit = _as_list(config.grad_sync_func, len(job.chunks)) if self._active else []
        self._chunks = job.chunks
        self._last = last_backwards(job.plan)
        self._from_hooks = not any(self._explicit) or (geometry.chunks == 1 and geometry.stage == 0)
        backwards = [i for i, op in enumerate(job.plan) if op.kind == "B"]
        order = {index: n for n, index in enumerate(backwards)}
        delay = geometry.stage if geometry.chunks > 1 else 0
        self._due: dict[int, list[int]] = {}
        if self._active and not self._from_hooks:
            for chunk, index in self._last.items():
                late = backwards[min(order[index] + delay, len(backwards) - 1)]
                self._due.setdefault(late, []).append(chunk)
        self._held = contextlib.ExitStack()

    def __enter__(self) -> _GradSyncWindows:
        self._hold()
        return self

    def __exit__(self, *exc: object) -> None:
        self._held.close()

    def _hold(self) -> None:
        for no_sync in _unique(self._no_sync):
            self._held.enter_context(no_sync())

    @contextlib.contextmanager
    def _released(self) -> Any:
        self._held.close()
        yield
        self._hold()

    def backward_of(self, index: int, op: Op) -> contextlib.AbstractContextManager[Any]:
        """The context to run a backward in: hooks may reduce iff it completes its chunk's gradients."""
        complete = self._active and self._from_hooks and self._last[op.chunk] == index
        return self._released() if complete else contextlib.nullcontext()

    def after_backward(self, index: int) -> None:
        """Launch the reductions that are due after the operation at `index`."""
        for chunk in self._due.get(index, ()):
            with self._released():
                self._explicit[chunk](self._chunks[chunk].parameters())


class _ParamGathers:
    """Aligned parameter gathers (`config.param_sync_func`, interleaved only): launched one chunk ahead of their use."""

    def __init__(self, job: Job) -> None:
        funcs = None if job.forward_only else job.config.param_sync_func
        self._funcs = _as_list(funcs, len(job.chunks)) if job.geometry.chunks > 1 else []
        self._chunks = job.chunks
        self._launched = 0
        self._forwards = [op for op in job.plan if op.kind == "F"]
        self._seen = 0
        self._lead = job.geometry.stage
        if any(self._funcs):
            self._launch_up_to(1)

    def before_forward(self, op: Op) -> None:
        """Launch the gather of the chunk after the one that runs `stage` forwards from now."""
        if any(self._funcs):
            ahead = min(self._seen + self._lead, len(self._forwards) - 1)
            self._launch_up_to(self._forwards[ahead].chunk + 1)
            self._launch_up_to(op.chunk)
        self._seen += 1

    def _launch_up_to(self, chunk: int) -> None:
        while self._launched <= min(chunk, len(self._chunks) - 1):
            self._funcs[self._launched](self._chunks[self._launched].parameters())
            self._launched += 1


def _as_list(value: Any, length: int) -> list[Any]:
    """One callable per chunk, from one for all, a list, or None."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * length


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(item for item in items if item is not None))
