"""What happens to gradients between the last backward and the optimizer, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import update_fp8_scales
from megatron.core.timers import timed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config


def _sum_sequence_parallel_grads(model: list[torch.nn.Module], config: TransformerConfig) -> None:
    """Sum over tensor-parallel ranks what each computed from its part of the sequence, or of the heads.

    Concerns whole (not cut) parameters: those marked `sequence_parallel`, and the norms of queries and keys.
    """
    group = parallel_state.resolve(None).tp
    if group is None or group.size() == 1 or not (config.sequence_parallel or config.qk_layernorm):
        return
    grads: dict[torch.dtype, list[Tensor]] = {}
    for chunk in model:
        for name, param in chunk.named_parameters():
            partial = (
                getattr(param, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name
            )
            if partial and param.requires_grad:
                grads.setdefault(param.main_grad.dtype, []).append(param.main_grad)  # type: ignore[attr-defined]
    for same in grads.values():
        flat = torch.cat([grad.reshape(-1) for grad in same])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([grad.numel() for grad in same])
        torch._foreach_copy_(same, [piece.view_as(grad) for piece, grad in zip(pieces, same)])


def _sum_over(group: ProcessGroup | None, weight: Tensor | None) -> None:
    if weight is not None and weight.requires_grad:
        dist.all_reduce(weight.main_grad, group=group)  # type: ignore[attr-defined]


def _sum_embedding_grads(model: list[torch.nn.Module]) -> None:
    """Sum the gradients of weights that several pipeline stages hold: tied words, inputs of encoder and decoder."""
    groups = parallel_state.resolve(None)
    if groups.embd is not None and groups.embd.size() > 1:
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        chunk = model[-1] if last and not first else model[0]
        language_model: Any = get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True)
        if language_model.share_embeddings_and_output_weights:
            _sum_over(groups.embd, language_model.shared_embedding_or_output_weight())
    if groups.pos_embd is not None and groups.pos_embd.size() > 1:
        language_model = get_attr_wrapped_model(model[0], "pre_process", return_model_obj=True)
        for weight in language_model.input_weights_of_both_stacks():
            _sum_over(groups.pos_embd, weight)


def _as_list(one_or_many: Any) -> list[Any]:
    return one_or_many if isinstance(one_or_many, list) else [one_or_many]


def _tokens_of_batch(num_tokens: Tensor) -> Tensor:
    """Tokens of the whole global batch: known to the last stage, summed over data-parallel ranks (cp has been).

    A stage that feeds several pipelines hears from all of them; they have counted the same.
    """
    last_ranks = parallel_state.get_pipeline_model_parallel_last_rank()
    pipelines = parallel_state.get_pipeline_model_parallel_group()
    heard = num_tokens
    for source, group in zip(_as_list(last_ranks), _as_list(pipelines)):
        heard = num_tokens.clone()
        dist.broadcast(heard, src=source, group=group)
    dist.all_reduce(heard, group=parallel_state.get_data_parallel_group())
    return heard


def finalize_model_grads(model: list[torch.nn.Module], num_tokens: Tensor | None = None) -> None:
    """Complete the gradients of all chunks of this rank (`model`); every rank must call, after the last backward.

    In this order: data-parallel reduction; sum over tensor ranks for sequence-parallel parameters; sum over stages for
    shared embeddings; the scales of the next step's fp8 products; and, with `num_tokens` (tokens of this rank's batch, a
    scalar tensor), division by the tokens of the global batch.
    """
    config = get_model_config(model[0])
    with timed(config, "all-grads-sync"):
        for chunk in model:
            chunk.finish_grad_sync()  # type: ignore[operator]
    with timed(config, "layernorm-grads-all-reduce"):
        _sum_sequence_parallel_grads(model, config)
    with timed(config, "embedding-grads-all-reduce"):
        _sum_embedding_grads(model)
    if config.fp8 is not None:
        update_fp8_scales(model, config)
    if num_tokens is not None:
        tokens = _tokens_of_batch(num_tokens).reshape(()).double()
        # Chosen on the device: asking for the number here would make the host wait for the whole backward.
        scale = torch.where(tokens > 0, tokens.reciprocal(), 1.0)
        for chunk in model:
            chunk.scale_gradients(scale)  # type: ignore[operator]
