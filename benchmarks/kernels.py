#!/usr/bin/env python3
"""Time every implementation of every operation, forward and backward, beside its eager reference in one run.

    python benchmarks/kernels.py                       # this machine's device; CPU shapes: s=256 b=4 h=320
    v=8192 python benchmarks/kernels.py --dtype bfloat16 --only core_attention

Prints milliseconds and the ratio eager / implementation (above 1: faster than the reference). On a GPU also
the bytes that must move (inputs and outputs once) over the time, as a share of a device-to-device copy
measured in the same run. On the CPU the time is the processor time of this process, which other programs
disturb least.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.core import device
from megatron.core.fusions import (
    core_attention,
    embedding_grad,
    fused_bias_dropout,
    fused_bias_geglu,
    fused_bias_gelu,
    fused_bias_swiglu,
    fused_cross_entropy,
    fused_layer_norm,
    fused_rms_norm,
    fused_rope,
    fused_softmax,
    grad_accumulation,
    linear_cross_entropy,
)
from megatron.core.fusions.core_attention import AttentionSpec
from megatron.core.kernels import capability, registry
from megatron.core.kernels.registry import Spec
from megatron.core.ssm import state_space
from megatron.core.ssm.state_space import ScanSpec


@dataclass(frozen=True)
class Shape:
    """Sizes of the benchmark: s tokens x b, hidden h, np heads, ng groups, ffn f, vocabulary v."""

    s: int
    b: int
    h: int
    np: int
    ng: int
    f: int
    v: int


SHAPES = {"cpu": Shape(256, 4, 320, 5, 5, 1280, 8192), "cuda": Shape(4096, 2, 4096, 32, 8, 11008, 32000)}


@dataclass
class Row:
    """One line of the table."""

    op: str
    name: str
    ms: float
    ratio: float
    copy_share: float | None


@dataclass
class Case:
    """An operation on concrete inputs: `eager` and every implementation are called by
    `call(implementation)`.
    """

    op: str
    label: str
    spec: Spec
    eager: Callable[..., Any]
    call: Callable[[Callable[..., Any]], Any]
    leaves: list[Tensor]


def build(shape: Shape, dtype: torch.dtype, where: str) -> list[Case]:
    """The operations at the sizes of one training step."""

    def t(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, dtype=kind, device=where).requires_grad_()

    s, b, h, v, f = shape.s, shape.b, shape.h, shape.v, shape.f
    spec, hn = Spec(where, dtype), shape.h // shape.np
    x, residual, w, bias = t(s, b, h), t(s, b, h), t(h), t(h)
    up, up_bias, gated = t(s, b, f), t(f), t(s, b, 2 * f)
    q, k, value = t(s, b, shape.np, hn), t(s, b, shape.ng, hn), t(s, b, shape.ng, hn)
    freqs = torch.randn(s, 1, 1, hn, device=where)
    logits, hidden, words = t(s * b, v), t(s * b, h), t(v, h)
    scores = t(b, shape.np, min(s, 1024), min(s, 1024))
    target = torch.randint(0, v, (s * b,), device=where)
    main_grad = torch.zeros(f, h, device=where)
    flat_x, flat_g = t(s * b, h).detach(), t(s * b, f).detach()
    table = torch.zeros(v, h, device=where)
    # A Mamba-2 layer of this width: heads of 64 channels, states of 128 numbers per channel.
    heads = 2 * h // 64
    groups = math.gcd(heads, 8)
    scanned, written, read = t(b, s, heads, 64), t(b, s, groups, 128), t(b, s, groups, 128)
    steps = torch.rand(b, s, heads, device=where).mul_(0.1).requires_grad_()
    rates = torch.rand(heads, device=where).mul_(-16).requires_grad_()

    def attend(drop: float) -> Callable[[Callable[..., Any]], Any]:
        return lambda run: run(q, k, value, causal=True, scale=hn**-0.5, dropout_p=drop)

    attention_spec = AttentionSpec(where, dtype, head_dim=hn, heads=shape.np, groups=shape.ng)
    dropout_spec = AttentionSpec(where, dtype, head_dim=hn, heads=shape.np, groups=shape.ng, dropout=True)
    eager_bda = lambda x, bias, r, p: fused_bias_dropout._bias_dropout_add_func((x, bias), r, p, True)  # noqa: E731
    return [
        Case("layer_norm", "", spec, fused_layer_norm.layer_norm_eager, lambda r: r(x, w, bias, 1e-5), [x, w, bias]),
        Case("rms_norm", "", spec, fused_rms_norm.rms_norm_eager, lambda r: r(x, w, 1e-5), [x, w]),
        Case(
            "bias_gelu", "", spec, lambda y, c: fused_bias_gelu.bias_gelu(c, y), lambda r: r(up, up_bias), [up, up_bias]
        ),
        Case("bias_swiglu", "", spec, lambda y, c: fused_bias_swiglu.swiglu(y), lambda r: r(gated, None), [gated]),
        Case("bias_geglu", "", spec, lambda y, c: fused_bias_geglu.geglu(y), lambda r: r(gated, None), [gated]),
        Case("bias_dropout_add", "p=0.1", spec, eager_bda, lambda r: r(x, bias, residual, 0.1), [x, bias, residual]),
        Case("masked_softmax", "causal", spec, fused_softmax.masked_softmax, lambda r: r(scores, None, 0.1, True), [scores]),
        Case("rope", "", spec, fused_rope.rope_eager, lambda r: r(q, freqs), [q]),
        Case("core_attention", "causal", attention_spec, core_attention.matmul_softmax, attend(0.0), [q, k, value]),
        Case("core_attention", "p=0.1", dropout_spec, core_attention.matmul_softmax, attend(0.1), [q, k, value]),
        Case(
            "vocab_cross_entropy", "", spec, fused_cross_entropy.vocab_cross_entropy_eager,
            lambda r: r(logits, target), [logits],
        ),
        Case(
            "linear_cross_entropy", "", spec, linear_cross_entropy.linear_cross_entropy_eager,
            lambda r: r(hidden, words, target), [hidden, words],
        ),
        Case(
            "linear_wgrad_accumulate", "", spec, grad_accumulation.linear_wgrad_accumulate_eager,
            lambda r: r(flat_x, flat_g, main_grad), [],
        ),
        Case(
            "state_space_scan", "", ScanSpec(where, dtype, width=64, state=128), state_space.chunked_scan,
            lambda r: r(scanned, steps, rates, written, read, 128)[0], [scanned, steps, rates, written, read],
        ),
        Case("embedding_grad", "", spec, embedding_grad.embedding_grad, lambda r: r(target, flat_x, table), []),
    ]  # fmt: skip


def once(case: Case, run: Callable[..., Any]) -> Callable[[], None]:
    """Forward and backward of one case with one implementation."""

    def step() -> None:
        out = case.call(run)
        if case.leaves:
            torch.autograd.grad(out, case.leaves, torch.ones_like(out))

    return step


def milliseconds(step: Callable[[], None], where: str, repeats: int) -> float:
    """Median over `repeats`, after a warm-up: events on a GPU, processor time on the CPU."""
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        if where == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.process_time()
            step()
            times.append((time.process_time() - start) * 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per millisecond that a large device-to-device copy reads and writes."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source) and None, "cuda", 10)


def must_move(case: Case) -> int:
    """Bytes of one forward and backward pass: inputs and output gradient read, output and input gradients
    written.
    """
    inputs = sum(leaf.nbytes for leaf in case.leaves)
    return 3 * inputs + 2 * case.leaves[0].nbytes if case.leaves else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="data types")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--repeats", type=int, default=15, help="timed repetitions")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's default)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    where = device.init(0).type
    ceiling = copy_bandwidth() if where == "cuda" else None
    rows: list[Row] = []
    for dtype in options.dtype:
        print(f"{dtype} on {capability.probe().device_name}, {SHAPES[where]}")
        for case in build(SHAPES[where], getattr(torch, dtype), where):
            if options.only not in case.op:
                continue
            reference = milliseconds(once(case, case.eager), where, options.repeats)
            print(f"  {case.op + ' ' + case.label:32} {'eager':15} {reference:9.3f} ms", flush=True)
            for entry in registry.entries(case.op):
                if entry.refusal(case.spec, capability.probe()) is not None or entry.name == "matmul_softmax":
                    continue
                spent = milliseconds(once(case, entry.load()), where, options.repeats)
                share = must_move(case) / spent / ceiling if ceiling else None
                rows.append(
                    Row(f"{case.op} {case.label} {dtype}", entry.name, spent, reference / spent, share)
                )
                note = f"  {100 * share:4.0f} % of copy bandwidth" if share is not None else ""
                print(
                    f"  {'':32} {entry.name:15} {spent:9.3f} ms  {reference / spent:5.2f}x{note}", flush=True
                )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
