"""TransformerEngine's fp8 recipe, random state tracker and recomputation under v0.9's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import transformer_engine as te
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class TEDelayedScaling(te.common.recipe.DelayedScaling):
    """The fp8 recipe that the flags describe: margin, amax history and its reduction."""

    def __init__(
        self,
        config: TransformerConfig,
        fp8_format: Any,
        override_linear_precision: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        super().__init__(
            margin=config.fp8_margin,
            fp8_format=fp8_format,
            amax_compute_algo=config.fp8_amax_compute_algo,
            amax_history_len=config.fp8_amax_history_len,
            override_linear_precision=override_linear_precision,
            fp8_dpa=config.fp8_dot_product_attention,
            fp8_mha=config.fp8_multi_head_attention,
        )


class TECudaRNGStatesTracker(te.pytorch.distributed.CudaRNGStatesTracker):
    """TE's tracker, whose states CUDA graphs can capture."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def is_initialized(self) -> bool:
        """Whether any state was added."""
        return self._is_initialized

    def reset(self) -> None:
        """Forget all states."""
        super().reset()
        self._is_initialized = False

    def set_states(self, states: dict[str, Any]) -> None:
        """Replace all states."""
        super().set_states(states)
        self._is_initialized = True

    def add(self, name: str, seed: int) -> None:
        """Add the state `name`, seeded with `seed`."""
        super().add(name, seed)
        self._is_initialized = True


def te_checkpoint(
    forward_func: Callable[..., Any],
    distribute_saved_activations: bool,
    get_rng_state_tracker: Callable[[], Any],
    tp_group: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    rotary_pos_emb: Tensor | None,
) -> Any:
    """Run `forward_func` without keeping activations, to be recomputed in the backward pass by TransformerEngine."""
    return te.pytorch.distributed.checkpoint(
        forward_func,
        hidden_states,
        attention_mask,
        context,
        context_mask,
        rotary_pos_emb,
        distribute_saved_activations=distribute_saved_activations,
        get_rng_state_tracker=get_rng_state_tracker,
        tp_group=tp_group,
    )
