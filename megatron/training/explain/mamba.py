"""What a Mamba layer does to one micro-batch on one rank: its scan runs in chunks, by Triton kernels or plain PyTorch.

The passes over memory are those of the chosen implementation and, operation by operation, of the mixer around it, which is
plain PyTorch in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron.training.explain.parameters import Mixer
from megatron.training.explain.work import Gemm, Work, column, column_input, join, norm, row
from megatron.training.explain.workload import Workload

#: Name of what happens between the projections of a Mamba layer.
SCAN = "scan"
#: Bytes of a number of the scan, whatever the activations are.
_WIDE = 4


def mamba_layer(w: Workload, mixer: Mixer) -> list[Work]:
    """Norm, projection, scan, projection, residual."""
    rows, sizes = w.tokens, mixer.sizes
    held = rows * w.replicated
    projected = sum(sizes.in_proj.values())
    return [
        norm(w, held),
        column(
            "in_proj", w, rows, w.hidden, projected, kept=column_input(w, rows, held, w.hidden, fp8=False)
        ),
        # What the scan is recomputed from; an fp32 scan keeps parts of it anyway.
        Work("projected", kept=rows * projected * w.bytes if mixer.recomputed or w.bytes == _WIDE else 0.0),
        _scan(w, mixer),
        row("out_proj", w, rows, sizes.d_inner, w.hidden, kept=rows * sizes.d_inner * w.bytes),
        join(w, held),
    ]


def _scan(w: Workload, mixer: Mixer) -> Work:
    """Everything between the projections: convolution, chunked scan, gated norm."""
    scan = _fused(w, mixer) if w.fused_scan else _plain(w, mixer)
    rows, sizes = w.tokens, mixer.sizes
    inner, convolved = sizes.d_inner, sum(sizes.conv.values())
    narrow = w.bytes < _WIDE

    # Summed over positions (the first of a sample over zeros before them) and activated.
    kept = (3 + (mixer.taps - 1) / w.seq) * convolved
    # What is gated, the gate (widened, and activated), and in the norm both of its factors.
    kept += (2 + narrow) * inner + (2 * inner + sizes.ngroups if mixer.normed else 0)

    # Padding; the sum, its bias and activation; widening where activations are narrow.
    before = (3 * mixer.taps + 3) * convolved + 2 * convolved * w.bytes / _WIDE
    before += narrow * convolved * (w.bytes + _WIDE) / _WIDE
    # D x, the gate; the norm; widening and narrowing.
    behind = (10 + 7 * mixer.normed) * inner + narrow * 2 * inner * (w.bytes + _WIDE) / _WIDE
    return Work(
        SCAN,
        gemms=scan.gemms,
        moved=_WIDE * rows * (before + scan.passes + behind),
        moved_back=_WIDE * rows * (3.2 * before + scan.passes_back + 2.3 * behind),  # counted
        kept=_WIDE * (rows * (kept + scan.kept) + scan.mask),
        again="always" if mixer.recomputed else "",
        operand_bytes=scan.operand_bytes,
    )


class _Cost(NamedTuple):
    """What one implementation of the scan does: products, numbers of four bytes read and written per token, and kept."""

    gemms: tuple[Gemm, ...]
    passes: float
    passes_back: float
    kept: float
    operand_bytes: int
    mask: float = 0.0


def _plain(w: Workload, mixer: Mixer) -> _Cost:
    """In torch's operations."""
    sizes = mixer.sizes
    chunks, length = _chunks(w, mixer)
    inner, state, groups, heads = sizes.d_inner, sizes.d_state, sizes.ngroups, sizes.nheads
    shared, handed = groups * state, inner * state / length
    pairs = heads * length  # of positions in a chunk, per token

    # With what fills up the last chunk x is a copy; B and C are, for each of their two products.
    kept = inner * (chunks * length > w.seq) + 4 * shared
    # Decays between positions, C B^T, and their product.
    kept += 2 * pairs + groups * length
    # dt x as a factor of two products, y of earlier chunks, and states as they were handed on and as a factor.
    kept += 4 * inner + 2 * handed + 4 * heads

    # Decays of positions, between them, and their product with C B^T; B and C as factors; the states.
    passes = 19 * heads + 7 * pairs + groups * length + 8 * shared + 9 * handed
    # x as two factors, y of earlier chunks.
    passes += 13 * inner
    gemms = (
        Gemm(length, length, state, w.micro * chunks * groups),  # C B^T
        Gemm(length, inner / heads, length, w.micro * chunks * heads),  # y within a chunk
        Gemm(inner / groups, state, length, w.micro * chunks * groups),  # states that a chunk adds
        Gemm(length, inner / groups, state, w.micro * chunks * groups),  # y of earlier chunks
    )
    return _Cost(gemms, passes, 1.9 * passes, kept, _WIDE, length * length / _WIDE)  # counted


def _fused(w: Workload, mixer: Mixer) -> _Cost:
    """By the kernels of core/kernels/triton/state_space.py, whose arguments are read or written once by each."""
    sizes = mixer.sizes
    chunks, length = _chunks(w, mixer)
    inner, state, groups, heads = sizes.d_inner, sizes.d_state, sizes.ngroups, sizes.nheads
    shared, handed = groups * state, inner * state / length
    half = w.bytes / _WIDE
    width = inner / heads

    # x, B and C narrowed, dt and its decays, and states before every chunk.
    kept = half * (inner + 2 * shared) + handed + 4 * heads
    # Narrowing; states that chunks add, handed on; y.
    passes = (1 + half) * (inner + 2 * shared) + 13 * heads
    passes += (1 + 2 * half) * inner + 3 * half * shared + 4 * handed
    # The gradient narrowed; the same with it and x for x and y; the gradients of B and C; those of decays.
    back = (1 + half) * inner + (1 + 3 * half) * inner + 3 * half * shared + 5 * handed
    back += 4 * half * inner + (2 + 4 * half) * shared + 2 * handed + 21 * heads
    every = w.micro * chunks * heads
    below = 0.75  # of the pairs of positions in a chunk: tiles end at the diagonal
    gemms = (
        Gemm(width, state, length, every),  # states that a chunk adds
        Gemm(length, width, state, every),  # y of earlier chunks
        Gemm(length, length, state, below * every),  # C B^T, by every head
        Gemm(length, width, length, below * every),  # y within a chunk
    )
    return _Cost(gemms, passes, back, kept, w.bytes)


def _chunks(w: Workload, mixer: Mixer) -> tuple[int, int]:
    """Chunks of a sequence and positions of one."""
    chunks = -(-w.seq // mixer.chunk)
    return chunks, -(-w.seq // chunks)
