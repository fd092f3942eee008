"""Context parallelism: one sequence divided among ranks, attended to by a ring or by exchanging heads."""

from megatron.core.context_parallel.all_to_all import all_to_all_attention
from megatron.core.context_parallel.choice import choose_attention
from megatron.core.context_parallel.ring import ring_attention

__all__ = ["all_to_all_attention", "choose_attention", "ring_attention"]
