"""The older address of what modules of both generations share."""

from megatron.core.transformer.module import (
    Float16Module,
    MegatronModule,
    conversion_helper,
    float16_to_fp32,
    fp32_to_float16,
    param_is_not_shared,
)

__all__ = [
    "Float16Module",
    "MegatronModule",
    "conversion_helper",
    "float16_to_fp32",
    "fp32_to_float16",
    "param_is_not_shared",
]
