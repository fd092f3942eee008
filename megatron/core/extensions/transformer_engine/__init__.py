"""TransformerEngine behind the signatures of this library; importable only where TransformerEngine is installed."""

from megatron.core.extensions.transformer_engine.attention import TEDotProductAttention
from megatron.core.extensions.transformer_engine.linear import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TELinear,
    TERowParallelLinear,
    condition_init_method,
)
from megatron.core.extensions.transformer_engine.norm import TENorm
from megatron.core.extensions.transformer_engine.state import (
    TECudaRNGStatesTracker,
    TEDelayedScaling,
    te_checkpoint,
)
from megatron.core.extensions.transformer_engine.user_buffers import start_user_buffers

__all__ = [
    "TEColumnParallelLinear",
    "TECudaRNGStatesTracker",
    "TEDelayedScaling",
    "TEDotProductAttention",
    "TELayerNormColumnParallelLinear",
    "TELinear",
    "TENorm",
    "TERowParallelLinear",
    "condition_init_method",
    "start_user_buffers",
    "te_checkpoint",
]
