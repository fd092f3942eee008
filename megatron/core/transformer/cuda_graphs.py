"""Layers whose kernels are recorded once and replayed (`--enable-cuda-graph`): one launch instead of a hundred.

A recording holds fixed addresses: of its input, its output, the activations in between, parameters and main gradients.
So it serves one shape and one microbatch at a time; every other call (evaluation, masks, packed documents, caches)
runs the layer as it is. The configuration's rules refuse what cannot be recorded at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer


class _Recordable(torch.nn.Module):
    """A layer as a function of tensors alone, which is what can be recorded."""

    def __init__(self, layer: TransformerLayer) -> None:
        super().__init__()
        self.layer = layer
        self._eager = layer.forward
        self._caching = [module for module in layer.modules() if hasattr(module, "is_first_microbatch")]

    def forward(self, hidden: Tensor, *rotary: Tensor) -> Tensor:
        """hidden [s/sp/cp, b, h], rotary angles if there are any -> hidden."""
        for module in self._caching:
            # A replay cannot ask whether the weight is new, so each derives again what it needs from it.
            module.is_first_microbatch = True  # type: ignore[assignment]
        output, _ = self._eager(hidden, None, rotary_pos_emb=rotary[0] if rotary else None)
        return output


def _dispatcher(
    layer: TransformerLayer, recorded: Callable[..., Tensor], shape: torch.Size, rotary: tuple[Tensor, ...]
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The layer's forward function from now on: a replay where the call is the recorded one."""
    eager = layer.forward

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Any = None,
        inference_params: Any = None,
        packed_seq_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `TransformerLayer.forward`: hidden_states [s/sp/cp, b, h] -> the same and the context."""
        others = (attention_mask, context, context_mask, inference_params, packed_seq_params)
        same_rotary = (rotary_pos_emb is None) == (not rotary) and (
            rotary_pos_emb is None or rotary_pos_emb.shape == rotary[0].shape
        )
        trains = layer.training and torch.is_grad_enabled()
        if trains and same_rotary and hidden_states.shape == shape and all(other is None for other in others):
            angles = () if rotary_pos_emb is None else (rotary_pos_emb,)
            return recorded(hidden_states, *angles), None
        return eager(
            hidden_states,
            attention_mask,
            context,
            context_mask,
            rotary_pos_emb,
            inference_params,
            packed_seq_params,
        )

    return forward


def record_layers(
    model: Sequence[torch.nn.Module], config: TransformerConfig, seq_length: int, micro_batch_size: int
) -> int:
    """Record every transformer layer of these chunks for micro-batches of this shape; returns how many there are.

    To be called once, after the data-parallel wrapper has allocated main gradients and before the first step zeroes
    them: recording runs each layer forward and backward on random data. Collectives in a layer are recorded too, so all
    ranks of the tensor- and context-parallel groups must call.
    """
    groups = parallel_state.resolve(None)
    length = seq_length // groups.size("cp")
    shape = (
        length // (groups.size("tp") if config.sequence_parallel else 1),
        micro_batch_size,
        config.hidden_size,
    )
    dtype = torch.float32 if config.fp32_residual_connection else config.params_dtype
    layers: list[TransformerLayer] = []
    samples: list[tuple[Tensor, ...]] = []
    for chunk in model:
        rotary = next((m for m in chunk.modules() if hasattr(m, "get_rotary_seq_len")), None)
        angles = () if rotary is None else (rotary(seq_length),)
        for module in chunk.modules():
            if isinstance(module, TransformerLayer):
                sample = torch.randn(shape, dtype=dtype, device=device.current(), requires_grad=True)
                layers.append(module)
                samples.append((sample, *angles))
    modules = tuple(_Recordable(layer) for layer in layers)
    recorded = device.record_graphs(modules, tuple(samples))
    for layer, replay, inputs in zip(layers, recorded, samples):
        layer.forward = _dispatcher(layer, replay, inputs[0].shape, inputs[1:])  # type: ignore[method-assign]
        layer.zero_grad(set_to_none=True)
    return len(layers)
