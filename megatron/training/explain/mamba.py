"""What a Mamba layer does to one micro-batch on one rank: its scan runs in plain PyTorch, in fp32 and in chunks.

The passes over memory are those of `core/ssm/state_space.py` and of the mixer around it, operation by operation.
"""

from __future__ import annotations

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
    rows, sizes = w.tokens, mixer.sizes
    chunks = -(-w.seq // mixer.chunk)
    length = -(-w.seq // chunks)
    inner, state, groups, heads = sizes.d_inner, sizes.d_state, sizes.ngroups, sizes.nheads
    convolved, shared, handed = sum(sizes.conv.values()), groups * state, inner * state / length
    pairs = heads * length  # of positions in a chunk, per token
    narrow = w.bytes < _WIDE

    # Summed over positions (the first of a sample over zeros before them) and activated; with what fills up the last chunk
    # x is a copy; B and C are, for each of their two products.
    kept = (3 + (mixer.taps - 1) / w.seq) * convolved
    kept += inner * (chunks * length > w.seq) + 4 * shared
    # Decays between positions, C B^T, and their product.
    kept += 2 * pairs + groups * length
    # dt x as a factor of two products, y of earlier chunks, and states as they were handed on and as a factor.
    kept += 4 * inner + 2 * handed + 4 * heads
    # What is gated, the gate (widened, and activated), and in the norm both of its factors.
    kept += (2 + narrow) * inner + (2 * inner + groups if mixer.normed else 0)

    # Padding; the sum, its bias and activation; and where activations are narrow, widening and narrowing.
    passes = (3 * mixer.taps + 3) * convolved + 2 * convolved * w.bytes / _WIDE
    passes += narrow * (convolved + 2 * inner) * (w.bytes + _WIDE) / _WIDE
    # Decays of positions, between them, and their product with C B^T; B and C as factors; the states.
    passes += 19 * heads + 7 * pairs + groups * length + 8 * shared + 9 * handed
    # x as two factors, y of earlier chunks, D x, the gate; the norm.
    passes += (23 + 7 * mixer.normed) * inner
    moved = _WIDE * rows * passes
    return Work(
        SCAN,
        gemms=(
            Gemm(length, length, state, w.micro * chunks * groups),  # C B^T
            Gemm(length, inner / heads, length, w.micro * chunks * heads),  # y within a chunk
            Gemm(inner / groups, state, length, w.micro * chunks * groups),  # states that a chunk adds
            Gemm(length, inner / groups, state, w.micro * chunks * groups),  # y of earlier chunks
        ),
        moved=moved,
        moved_back=2.5 * moved,  # counted
        kept=_WIDE * rows * kept + length * length,
        again="always" if mixer.recomputed else "",
        operand_bytes=_WIDE,
    )
