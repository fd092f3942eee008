"""Model FLOPs of a step, and what share of the machine's peak they make."""

from __future__ import annotations

from argparse import Namespace
from functools import lru_cache

from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols, layer_kinds

#: Dense half-precision peak in TFLOP/s by device name fragment (vendors' data sheets, without structured sparsity).
DENSE_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.5,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.5,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "V100": 125.0,
    "RTX 4090": 165.2,
}


def num_floating_point_operations(args: Namespace, batch_size: int) -> float:
    """FLOPs of forward and backward over `batch_size` samples (spec: training, section 20.1).

    Full s x s attention and the logits are counted; recomputation is not. A hybrid model's layers are counted by their
    kinds, Mamba layers in the sizes that `mamba_stack_spec` has.
    """
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    hidden, seq, layers = args.hidden_size, args.seq_length, args.num_layers
    projection_ratio = args.kv_channels * args.num_attention_heads / hidden
    experts = 1 if args.num_experts is None else args.moe_router_topk
    gated = 3 / 2 if args.swiglu else 1
    if is_hybrid(args):
        kinds = _kinds(
            layers, args.hybrid_attention_ratio, args.hybrid_mlp_ratio, args.hybrid_override_pattern
        )
        per_token = {
            Symbols.ATTENTION: 4
            * hidden**2
            * (1 + groups / args.num_attention_heads + seq / hidden)
            * projection_ratio,
            Symbols.MLP: 4 * hidden * args.ffn_hidden_size * gated,
            Symbols.MAMBA: _mamba_flops(hidden),
        }
        forward = sum(per_token[kind] for kind in kinds) + 2 * hidden * args.padded_vocab_size
        return 3 * batch_size * seq * forward
    return (
        12
        * batch_size
        * seq
        * layers
        * hidden
        * hidden
        * (
            (1 + groups / args.num_attention_heads + seq / hidden) * projection_ratio
            + (args.ffn_hidden_size / hidden) * experts * gated
            + args.padded_vocab_size / (2 * layers * hidden)
        )
    )


def is_hybrid(args: Namespace) -> bool:
    """Whether the arguments are a hybrid model's: a flag says what its layers are, or the specification is v0.9's stack."""
    flags = ("hybrid_attention_ratio", "hybrid_mlp_ratio", "hybrid_override_pattern")
    spec = getattr(args, "spec", None)
    return any(getattr(args, flag, None) for flag in flags) or bool(spec and spec[-1] == "mamba_stack_spec")


_kinds = lru_cache(layer_kinds)


def _mamba_flops(hidden: int) -> float:
    """Forward FLOPs per token of a Mamba-2 layer: two projections, the convolution, the recurrence (5 per state number)."""
    inner, state, groups, head, taps = 2 * hidden, 128, 8, 64, 4
    convolved = inner + 2 * groups * state
    projections = 2 * hidden * (inner + convolved + inner / head) + 2 * inner * hidden
    return projections + 2 * taps * convolved + 5 * inner * state


def throughput_tflops(args: Namespace, batch_size: int, seconds: float) -> float:
    """Model TFLOP/s per rank for a step of `batch_size` samples that took `seconds`."""
    return num_floating_point_operations(args, batch_size) / (seconds * 1e12 * args.world_size)


def dense_peak_tflops(device_name: str) -> float | None:
    """The dense half-precision peak of a device, None if it is not in the table."""
    return next((peak for name, peak in DENSE_PEAK_TFLOPS.items() if name in device_name), None)
