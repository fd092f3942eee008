"""One operation on one micro-batch of one rank, and the operations that layers of every kind are made of.

GEMMs are followed in the backward pass by two of the same size. Kept bytes follow Korthikanti et al. 2022
(arXiv:2205.05198, section 4), with this library's kernels in place of theirs: every tensor is counted once, however many
operations keep it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron.training.explain.workload import Workload


class Gemm(NamedTuple):
    """`batch` products [m, k] x [k, n]."""

    m: float
    n: float
    k: float
    batch: float = 1.0


@dataclass(frozen=True)
class Work:
    """One operation on one micro-batch of one rank.

    `attention` counts FLOPs of fused attention in the forward pass (two and a half times as many follow). `moved` and
    `moved_back` are bytes read and written beside GEMMs, `kept` bytes held until the backward pass. Transfers are whole
    tensors in bytes: `gathered` over the tensor-parallel group (all-gather or reduce-scatter) in the forward pass,
    `gathered_back` waited for in the backward pass, `gathered_behind` behind a GEMM of the backward pass, `ring` the keys
    and values that pass around the context-parallel ranks, `exchanged` what a rank sends to other experts' ranks. `again`:
    it keeps nothing and runs again in the backward pass, with `selective` recomputation or `always`. `operand_bytes`: of
    an element of the GEMMs' operands, where they are not of the activations' type.
    """

    name: str
    gemms: tuple[Gemm, ...] = ()
    attention: float = 0.0
    moved: float = 0.0
    moved_back: float = 0.0
    kept: float = 0.0
    gathered: float = 0.0
    gathered_back: float = 0.0
    gathered_behind: float = 0.0
    ring: float = 0.0
    exchanged: float = 0.0
    again: str = ""
    operand_bytes: int | None = None

    @property
    def flops(self) -> float:
        """Of the forward pass."""
        return self.attention + sum(2 * gemm.m * gemm.n * gemm.k * gemm.batch for gemm in self.gemms)

    def runs_again(self, w: Workload) -> bool:
        """Whether the backward pass runs it again by itself, not together with the layers around it."""
        return self.again in ("always", w.recompute)


def column(
    name: str, w: Workload, rows: float, inputs: int, outputs: float, kept: float, fp8: bool = False
) -> Work:
    """A column-parallel linear: gathers its input's tokens, or sums its input's gradient."""
    whole = rows * inputs * w.bytes if w.tp > 1 else 0.0
    return _linear(
        Work(
            name,
            kept=kept,
            gathered=whole if w.sequence_parallel else 0.0,
            gathered_behind=2 * whole,  # gather again and reduce-scatter, or an all-reduce
        ),
        w,
        Gemm(rows, outputs, inputs),
        fp8,
    )


def row(
    name: str, w: Workload, rows: float, inputs: float, outputs: int, kept: float, fp8: bool = False
) -> Work:
    """A row-parallel linear: sums its output over the ranks."""
    whole = rows * outputs * w.bytes if w.tp > 1 else 0.0
    return _linear(
        Work(
            name,
            kept=kept,
            gathered=whole if w.sequence_parallel else 2 * whole,
            gathered_back=whole if w.sequence_parallel else 0.0,
        ),
        w,
        Gemm(rows, outputs, inputs),
        fp8,
    )


def _linear(transfers: Work, w: Workload, gemm: Gemm, fp8: bool) -> Work:
    """The operation with what a linear of either kind does on its rank: a product, and passes over its operands."""
    rows, outputs, inputs, _ = gemm
    return replace(
        transfers,
        gemms=(gemm,),
        moved=_quantising(w, rows * inputs) if fp8 else 0.0,
        # The weight gradient is added to its accumulator.
        moved_back=2 * inputs * outputs * w.gradient_bytes + (_quantising(w, rows * outputs) if fp8 else 0.0),
        operand_bytes=1 if fp8 else None,
    )


def _quantising(w: Workload, elements: float) -> float:
    """Bytes moved to make an fp8 operand: read once, written as it is and transposed."""
    return elements * (w.bytes + 2)


def column_input(w: Workload, rows: float, held: float, width: float, fp8: bool) -> float:
    """Bytes that a column-parallel linear keeps of its input: as it came, or in fp8 what is not gathered again."""
    gathers = w.sequence_parallel and w.tp > 1
    return rows * width if fp8 and w.fp8_wgrad and not gathers else held * width * w.bytes


def row_input(w: Workload, elements: float, fp8: bool, needed: bool) -> float:
    """Bytes that are kept of a row-parallel linear's input; `needed`: whoever made it keeps it too."""
    if not (fp8 and w.fp8_wgrad):
        return elements * w.bytes
    return elements * (1 + w.bytes * needed)


def norm(w: Workload, held: float) -> Work:
    """A norm of the residual stream: keeps its input; its output is kept by who reads it."""
    stream, out = held * w.hidden * w.residual_bytes, held * w.hidden * w.bytes
    return Work("norm", moved=stream + out, moved_back=2 * stream + out, kept=stream + 8 * held)


def join(w: Workload, held: float) -> Work:
    """residual + dropout(x + bias): keeps the mask."""
    out = held * w.hidden * w.bytes
    mask = held * w.hidden if w.dropout else 0.0
    return Work("residual", moved=3 * out + mask, moved_back=2 * out + mask if w.dropout else 0.0, kept=mask)
