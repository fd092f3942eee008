"""The state-space scan of Mamba-2, forward and backward, in chunks whose [l, l] scores and decays never reach memory.

Dao & Gu 2024, arXiv:2405.21060, section 6. Forward: the decays since each chunk's begin; what every chunk adds to the
state; these sums handed on from chunk to chunk, one after the other; outputs, tile by tile, from the state before the chunk
and from the chunk's own positions. Backward: the last three with inputs and outputs exchanged, then the gradients of B and C
(a program goes through heads of a group, so nothing is added atomically), then those of dt and A. Of the forward pass it
keeps one fp32 state per chunk and computes the rest again. Deterministic.
"""

# mypy: allow-untyped-defs
# (arguments of kernels are pointers and numbers of Triton's own language)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.core.kernels.triton.launch import multiprocessors, power_of_two
from megatron.core.kernels.triton.state_space_kernels import (
    chunk_decay,
    chunk_products,
    chunk_states,
    decay_grads,
    pass_states,
    shared_grads,
)

LONGEST_CHUNK = 128  # positions: programs of the backward pass hold a row of weights for each of theirs
_HEADS = 8  # per program, where one holds the decays of a whole chunk
_PASSED = 1024  # numbers of a state per program that hands them on

# Type and precision of the operands of matrix products. fp16 is widened: TF32 holds its numbers exactly and keeps as many
# bits of weights and states, but they and the gradients of scaled losses do not overflow in it.
PRODUCTS = {
    torch.float32: (tl.float32, "ieee"),
    torch.float16: (tl.float32, "tf32"),
    torch.bfloat16: (tl.bfloat16, "ieee"),
}


class Tiles(NamedTuple):
    """Block sizes, then warps and stages, of the kernels with matrix products."""

    states: tuple[int, int, int, int, int]  # channels, numbers of the state, positions
    products: tuple[int, int, int, int]  # rows, columns
    grads: tuple[int, int, int]  # rows


def tiles_for(dtype: torch.dtype, padded_state: int) -> Tiles:
    """Tiles whose registers fit sm_80, sm_90 and sm_100 without spilling, for states of so many numbers per head."""
    usual = padded_state <= 64 * 128
    if dtype == torch.bfloat16:
        return Tiles((64, 64, 32, 4, 2), (64, 32, 4 if usual else 8, 2), (64 if usual else 32, 8, 2))
    if usual:
        return Tiles((64, 64, 32, 4, 2), (64, 32, 4, 2), (32, 8, 1))
    return Tiles((32, 32, 32, 4, 1), (32, 32, 8, 1), (16, 8, 1))


class _Call(NamedTuple):
    """One call: its sizes, and dt and the decays since each chunk's begin as fp32 [b, np, s]."""

    steps: Tensor
    decay: Tensor
    width: int
    groups: int
    state: int
    chunk: int

    @property
    def chunks(self) -> int:
        """Chunks of a sequence."""
        return triton.cdiv(self.steps.size(2), self.chunk)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Length, positions per chunk, chunks, heads."""
        return self.steps.size(2), self.chunk, self.chunks, self.steps.size(1)

    @property
    def share(self) -> int:
        """Heads of a group."""
        return self.steps.size(1) // self.groups

    @property
    def passing(self) -> int:
        """Programs that hand on one head's states."""
        return triton.cdiv(self.width * self.state, _PASSED)

    @property
    def wide(self) -> int:
        """Channels of a head, padded."""
        return max(power_of_two(self.width), 16)

    @property
    def deep(self) -> int:
        """Numbers of the state per channel, padded."""
        return max(power_of_two(self.state), 16)

    def tiles(self, dtype: torch.dtype) -> Tiles:
        """Those for operands of this type."""
        return tiles_for(dtype, self.wide * self.deep)

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """Sizes and operands that kernels are compiled for."""
        operand, precision = PRODUCTS[dtype]
        padded = {"WIDE": self.wide, "DEEP": self.deep}
        return {
            "WIDTH": self.width,
            "STATE": self.state,
            **padded,
            "OPERAND": operand,
            "PRECISION": precision,
        }

    def new_states(self) -> Tensor:
        """Room for a state per chunk: fp32 [b, c, np, hn, n]."""
        batch, heads, _ = self.steps.shape
        return self.steps.new_empty(batch, self.chunks, heads, self.width, self.state)


def _begin(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, chunk: int) -> _Call:
    batch, length, heads, width = x.shape
    steps = torch.empty(batch, heads, length, dtype=torch.float32, device=x.device)
    at = _Call(steps, torch.empty_like(steps), width, B.size(2), B.size(3), chunk)
    chunk_decay[(at.chunks, triton.cdiv(heads, _HEADS), batch)](
        dt, A, steps, at.decay, length, heads, chunk, *dt.stride(),
        HEADS=_HEADS, BLOCK=power_of_two(chunk), num_warps=4,
    )  # fmt: skip
    return at


def _added(value: Tensor, shared: Tensor, at: _Call, backward: bool) -> Tensor:
    """What every chunk adds to the state behind it, backward to the gradient of that before it: [b, c, np, hn, n]."""
    out = at.new_states()
    channels, numbers, positions, warps, stages = at.tiles(shared.dtype).states
    channels, numbers = min(channels, at.wide), min(numbers, at.deep)
    tiles = triton.cdiv(at.width, channels) * triton.cdiv(at.state, numbers)
    operand, precision = PRODUCTS[shared.dtype]
    length, chunk, chunks, heads = at.sizes
    chunk_states[(value.size(0) * heads, tiles, chunks)](
        value, shared, at.steps, at.decay, out, length, chunk, heads, at.share,
        *value.stride()[:3], *shared.stride()[:3],
        BACKWARD=backward, WIDTH=at.width, STATE=at.state, BW=channels, BS=numbers, BK=positions,
        OPERAND=operand, PRECISION=precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _pass_on(
    first: Tensor | None, states: Tensor, at: _Call, entering: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Replace what chunks add by what reaches them, beginning with `first` (default: zeros), backward with the last chunk.

    Backward is with the states `entering` the chunks. Returns what leaves the other end [b, np, hn, n], and backward
    what a gradient that crosses a chunk contributes to that of its decays [b, c, np, programs].
    """
    batch, heads, _ = at.steps.shape
    last = states.new_empty(batch, heads, at.width, at.state)
    crossing = states.new_empty(batch, at.chunks, heads, at.passing) if entering is not None else last
    pass_states[(batch * heads, at.passing)](
        last if first is None else first.contiguous(), states, last, at.decay,
        states if entering is None else entering, crossing, *at.sizes, at.width * at.state,
        HAS_FIRST=first is not None, BACKWARD=entering is not None, BLOCK=_PASSED, num_warps=4,
    )  # fmt: skip
    return last, crossing


def _products(
    own: Tensor,
    other: Tensor,
    value: Tensor,
    x: Tensor,
    states: Tensor,
    at: _Call,
    out: Tensor,
    backward: bool,
) -> Tensor:
    """Write y, or the gradient of x, into contiguous `out`; backward returns what dt gets beside decays: [b, np, s]."""
    rows, cols, warps, stages = at.tiles(own.dtype).products
    step_grad = torch.empty_like(at.steps) if backward else at.steps
    batch, heads, _ = at.steps.shape
    chunk_products[(batch * heads, triton.cdiv(at.chunk, rows), at.chunks)](
        own, other, value, x, states, at.steps, at.decay, out, step_grad, *at.sizes, at.share,
        *own.stride()[:3], *other.stride()[:3], *value.stride()[:3], *x.stride()[:3],
        BACKWARD=backward, BM=rows, BN=cols, **at.constants(own.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return step_grad


def _shared_grads(
    own: Tensor,
    other: Tensor,
    factor: Tensor,
    shared: Tensor,
    states: Tensor,
    at: _Call,
    dtype: torch.dtype,
    of_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient [b, s, ng, n] of `shared`, which is B (`of_b`) or C, and what decays get from it [b, np, s].

    The latter in two parts: from positions of the same chunk, and through the states between chunks.
    """
    rows, warps, stages = at.tiles(shared.dtype).grads
    batch, length = shared.shape[:2]
    blocks = triton.cdiv(at.chunk, rows)
    parts = _parts(at.share, blocks * at.chunks * batch * at.groups, 4 * multiprocessors(shared))
    out = torch.empty(
        (batch, length, at.groups, parts, at.state),
        dtype=dtype if parts == 1 else torch.float32,
        device=shared.device,
    )
    within, beyond = torch.empty_like(at.steps), torch.empty_like(at.steps)
    shared_grads[(batch * at.groups * parts, blocks, at.chunks)](
        own, other, factor, shared, states, at.steps, at.decay, out, within, beyond,
        *at.sizes, at.groups, at.share, parts,
        *own.stride()[:3], *other.stride()[:3], *factor.stride()[:3], *shared.stride()[:3],
        OF_B=of_b, BM=rows, BN=max(power_of_two(at.chunk), 16), **at.constants(shared.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out.squeeze(3) if parts == 1 else out.sum(3).to(dtype), within, beyond


def _parts(share: int, programs: int, wanted: int) -> int:
    """Into how many equal parts the heads of a group are divided, so that there are as many programs as wanted."""
    return next((n for n in range(1, share) if share % n == 0 and n * programs >= wanted), share)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        initial_state: Tensor | None,
        operands: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """x [b, s, np, hn], dt [b, s, np], A [np], B and C [b, s, ng, n] -> y as x and the last state, in fp32."""
        ctx.dtypes = [None if t is None else t.dtype for t in (x, dt, A, B, C, initial_state)]
        x, B, C = (
            t if t.stride(-1) == 1 else t.contiguous()
            for t in (x.to(operands), B.to(operands), C.to(operands))
        )
        A = A.contiguous()
        chunks = triton.cdiv(x.size(1), min(chunk_size, LONGEST_CHUNK))
        at = _begin(x, dt, A, B, triton.cdiv(x.size(1), chunks))  # as equal as can be
        states = _added(x, B, at, backward=False)
        last, _ = _pass_on(initial_state, states, at)
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        _products(C, B, x, x, states, at, y, backward=False)
        ctx.save_for_backward(x, A, B, C, at.steps, at.decay, states)
        ctx.chunk = at.chunk
        return y, last

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        """grad_y as y, grad_last [b, np, hn, n] -> gradients of x, dt, A, B, C and the initial state."""
        x, A, B, C, steps, decay, states = ctx.saved_tensors
        at = _Call(steps, decay, x.size(3), B.size(2), B.size(3), ctx.chunk)
        x_dtype, dt_dtype, A_dtype, B_dtype, C_dtype, initial_dtype = ctx.dtypes
        if x.dtype == torch.bfloat16:  # only products read it, which would round it as often as they read it
            grad_y = grad_y.to(x.dtype)
        grad_y = grad_y if grad_y.stride(-1) == 1 else grad_y.contiguous()
        after = _added(grad_y, C, at, backward=True)
        grad_initial, crossing = _pass_on(grad_last, after, at, states)
        grad_x = torch.empty(x.shape, dtype=x_dtype, device=x.device)
        step_grad = _products(B, C, grad_y, x, after, at, grad_x, backward=True)
        grad_B, writes, writes_beyond = _shared_grads(x, grad_y, C, B, after, at, B_dtype, of_b=True)
        grad_C, reads, reads_before = _shared_grads(grad_y, x, B, C, states, at, C_dtype, of_b=False)
        batch, heads, length = steps.shape
        grad_dt = torch.empty(batch, length, heads, dtype=dt_dtype, device=x.device)
        grad_A = torch.empty(batch, at.chunks, heads, dtype=torch.float32, device=x.device)
        decay_grads[(at.chunks, triton.cdiv(heads, _HEADS), batch)](
            reads, reads_before, writes, writes_beyond, crossing, step_grad, steps, A, grad_dt, grad_A,
            length, at.chunk, heads, at.passing,
            HEADS=_HEADS, BLOCK=power_of_two(at.chunk), PROGRAMS=power_of_two(at.passing), num_warps=4,
        )  # fmt: skip
        return (
            grad_x,
            grad_dt,
            grad_A.sum((0, 1)).to(A_dtype),
            grad_B,
            grad_C,
            None,
            None if initial_dtype is None else grad_initial.to(initial_dtype),
            None,
        )


def state_space_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
    operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract of `chunked_scan`: y [b, s, np, hn] and the last state [b, np, hn, n] in fp32, by rounded operands.

    x, B and C are rounded to `operands` (default: the type of x), weights and states to as many bits where a matrix
    product takes them. All sums and everything else are fp32. Chunks have at most `LONGEST_CHUNK` positions.
    """
    if not x.numel():
        empty = x.new_zeros(x.size(0), *x.shape[2:], B.size(-1))
        state = empty if initial_state is None else initial_state
        return x.to(torch.float32), state.to(torch.float32)
    return _Scan.apply(x, dt, A, B, C, chunk_size, initial_state, operands or x.dtype)
