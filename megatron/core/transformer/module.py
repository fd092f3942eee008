"""The base class of every module of the library, and the half-precision wrapper around a whole model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.placement import make_sharded_tensors_for_checkpoint
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default

_FULL_PRECISION = torch.float32
_HALF_PRECISION = (torch.float16, torch.bfloat16)


def param_is_not_shared(param: Tensor) -> bool:
    """False for the second copy of a tied weight, which norms and counts must leave out."""
    return not getattr(param, "shared", False)


class MegatronModule(torch.nn.Module):
    """A torch module with a config and a description of its checkpoint pieces."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self._microbatch_counters: list[torch.nn.Module] | None = None

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """The state dict as it is written to a checkpoint; a module overrides this to leave something out."""
        return self.state_dict(prefix=prefix, keep_vars=keep_vars)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Sharded tensors of this module and everything below it.

        prefix goes before every key; sharded_offsets are (axis, offset, fragments) of axes stacked in front,
        such as the layer axis. Own parameters are described as replicated over tensor parallel ranks.
        """
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(own, prefix, sharded_offsets=sharded_offsets)
        for name, module in self.named_children():
            sharded.update(sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata))
        return sharded

    def set_is_first_microbatch(self) -> None:
        """Tell modules that cache a transformed weight that the weights have just changed."""
        if self._microbatch_counters is None:  # looked for once: a deep model has thousands of modules
            self._microbatch_counters = [m for m in self.modules() if hasattr(m, "is_first_microbatch")]
        for module in self._microbatch_counters:
            module.is_first_microbatch = True  # type: ignore[assignment]


def conversion_helper(val: Any, conversion: Callable[[Tensor], Tensor]) -> Any:
    """Apply `conversion` to a tensor or, keeping the nesting, to every leaf of tuples and lists."""
    if isinstance(val, (tuple, list)):
        converted = [conversion_helper(v, conversion) for v in val]
        return tuple(converted) if isinstance(val, tuple) else converted
    return conversion(val)


def fp32_to_float16(val: Any, float16_convertor: Callable[[Tensor], Tensor]) -> Any:
    """Convert every fp32 tensor in a nest; everything else passes."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dtype is _FULL_PRECISION:
            return float16_convertor(leaf)
        return leaf

    return conversion_helper(val, convert)


def float16_to_fp32(val: Any) -> Any:
    """Convert every fp16 or bf16 tensor in a nest to fp32; everything else passes."""

    def convert(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in _HALF_PRECISION else leaf

    return conversion_helper(val, convert)


class Float16Module(MegatronModule):
    """A model with fp16 or bf16 parameters: fp32 inputs become half on the first stage, outputs fp32 on
    the last.
    """

    def __init__(self, config: TransformerConfig, module: torch.nn.Module) -> None:
        super().__init__(config)
        self.fp16 = config.fp16
        self.bf16 = config.bf16
        if not (self.fp16 or self.bf16):
            raise ValueError("Float16Module needs config.fp16 or config.bf16; wrap nothing for fp32 training")
        dtype = torch.float16 if self.fp16 else torch.bfloat16
        self.module: Any
        self.add_module("module", module.to(dtype))
        self.float16_convertor: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(dtype)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hand the previous stage's output to the wrapped model."""
        self.module.set_input_tensor(input_tensor)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Arguments and result of the wrapped model; only their precision changes."""
        if parallel_state.is_pipeline_first_stage():
            inputs = fp32_to_float16(inputs, self.float16_convertor)
        outputs = self.module(*inputs, **kwargs)
        if parallel_state.is_pipeline_last_stage():
            outputs = float16_to_fp32(outputs)
        return outputs

    def state_dict(  # type: ignore[override]
        self, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The wrapped model's state dict: the wrapper adds no level to the names."""
        return self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """The wrapped model's state dict for a checkpoint."""
        return self.module.state_dict_for_save_checkpoint(prefix=prefix, keep_vars=keep_vars)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> ShardedStateDict:
        """The wrapped model's sharded state dict."""
        return self.module.sharded_state_dict(prefix, *args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> Any:  # type: ignore[override]
        """Load into the wrapped model; returns torch's missing and unexpected keys."""
        return self.module.load_state_dict(state_dict, strict=strict)
