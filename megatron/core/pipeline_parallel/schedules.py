"""The public schedule functions: choose a plan, run it, finish the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.errors import InvariantError, ScheduleError
from megatron.core.pipeline_parallel import executor, p2p_communication
from megatron.core.pipeline_parallel.microbatch import (
    Tensors,
    backward_step,
    check_first_val_step,
    custom_backward,
    deallocate_output_tensor,
    forward_step,
    set_current_microbatch,
)
from megatron.core.pipeline_parallel.p2p_communication import Shape
from megatron.core.pipeline_parallel.plan import Geometry, forward_only, make_plan
from megatron.core.timers import timed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import (
    drain_embedding_wgrad_compute,
    get_attr_wrapped_model,
    get_model_config,
    get_model_type,
    get_model_xattn,
)

__all__ = [
    "backward_step",
    "check_first_val_step",
    "clear_embedding_activation_buffer",
    "custom_backward",
    "deallocate_output_tensor",
    "finish_embedding_wgrad_compute",
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_with_interleaving",
    "forward_backward_pipelining_without_interleaving",
    "forward_step",
    "get_forward_backward_func",
    "get_tensor_shapes",
    "recv_backward",
    "recv_forward",
    "send_backward",
    "send_backward_recv_forward",
    "send_forward",
    "send_forward_recv_backward",
    "set_current_microbatch",
]

Chunks = torch.nn.Module | Sequence[torch.nn.Module]


def get_forward_backward_func() -> Callable[..., list[Any]]:
    """The schedule for the current parallel layout.

    Call it with keyword arguments: forward_step_func(data_iterator, model) -> (output, loss_func); data_iterator and model
    (lists with one entry per chunk when interleaved); num_microbatches; seq_length and micro_batch_size (they fix the shape
    stages exchange); decoder_seq_length; forward_only; collect_non_loss_data; first_val_step. It returns what the loss
    function reported for each microbatch, on the last stage only. Every rank of the pipeline must call.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return forward_backward_no_pipelining
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None:
        return forward_backward_pipelining_with_interleaving
    return forward_backward_pipelining_without_interleaving


def forward_backward_no_pipelining(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: Chunks,
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
) -> list[Any]:
    """Microbatches one after another on a single stage. Arguments: see `get_forward_backward_func`."""
    return _run(
        Geometry(0, 1),
        _only(data_iterator, "data iterator"),
        _only(model, "model chunk"),
        forward_step_func,
        num_microbatches,
        (seq_length, micro_batch_size, decoder_seq_length),
        forward_only,
        collect_non_loss_data,
        first_val_step,
    )


def forward_backward_pipelining_without_interleaving(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: Chunks,
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
) -> list[Any]:
    """1F1B over the pipeline's stages. Arguments: see `get_forward_backward_func`."""
    return _run(
        Geometry(_stage(), _stages()),
        _only(data_iterator, "data iterator"),
        _only(model, "model chunk"),
        forward_step_func,
        num_microbatches,
        (seq_length, micro_batch_size, decoder_seq_length),
        forward_only,
        collect_non_loss_data,
        first_val_step,
    )


def forward_backward_pipelining_with_interleaving(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: Chunks,
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
) -> list[Any]:
    """Interleaved 1F1B over several chunks per stage. Arguments: see `get_forward_backward_func`."""
    chunks = list(model) if isinstance(model, Sequence) else [model]
    if get_model_type(chunks[0]) == ModelType.encoder_and_decoder:
        raise ScheduleError(
            "--num-layers-per-virtual-pipeline-stage",
            "the interleaved schedule does not know encoder-decoder models",
            "drop it, or train a model with one stack of layers",
        )
    if decoder_seq_length is not None and decoder_seq_length != seq_length:
        raise ScheduleError(
            "--decoder-seq-length",
            f"the interleaved schedule exchanges one shape, but lengths are {seq_length} and {decoder_seq_length}",
            "make the two equal, or drop --num-layers-per-virtual-pipeline-stage",
        )
    return _run(
        Geometry(_stage(), _stages(), len(chunks)),
        _one_each(data_iterator, len(chunks)),
        chunks,
        forward_step_func,
        num_microbatches,
        (seq_length, micro_batch_size, decoder_seq_length),
        forward_only,
        collect_non_loss_data,
        first_val_step,
    )


def _run(
    geometry: Geometry,
    data_iterators: Sequence[Any],
    chunks: Sequence[torch.nn.Module],
    forward_step_func: Callable[..., Any],
    num_microbatches: int,
    sizes: tuple[int, int, int | None],
    evaluate: bool,
    collect_non_loss_data: bool,
    first_val_step: bool | None,
) -> list[Any]:
    """Build the job, run it, and finish the gradients (spec: training, sections 9 and 14)."""
    config = get_model_config(chunks[0])
    model_type = get_model_type(chunks[0])
    xattn = get_model_xattn(chunks[0])
    seq_length, micro_batch_size, decoder_seq_length = sizes
    plan = make_plan(geometry.stage, geometry.stages, geometry.chunks, num_microbatches)
    embedding_module = None if evaluate else clear_embedding_activation_buffer(config, chunks)

    def shapes_from(stage: int) -> list[tuple[int, ...]]:
        return get_tensor_shapes(
            rank=stage,
            model_type=model_type,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            decoder_seq_length=decoder_seq_length,
            config=config,
            encoder_decoder_xattn=xattn,
        )

    job = executor.Job(
        forward_step_func=forward_step_func,
        data_iterators=data_iterators,
        chunks=chunks,
        config=config,
        model_type=model_type,
        num_microbatches=num_microbatches,
        plan=forward_only(plan) if evaluate else plan,
        geometry=geometry,
        shapes_from=shapes_from,
        forward_only=evaluate,
        collect_non_loss_data=collect_non_loss_data,
        first_val_step=first_val_step,
        encoder_decoder_xattn=xattn,
    )
    with timed(config, "forward-backward"), torch.set_grad_enabled(not evaluate):
        reported, num_tokens = executor.run(job)
        if not evaluate:
            finish_embedding_wgrad_compute(config, embedding_module)
            if config.finalize_model_grads_func is not None:
                config.finalize_model_grads_func(
                    list(chunks), num_tokens if config.calculate_per_token_loss else None
                )
    return reported


def get_tensor_shapes(
    *,
    rank: int,
    model_type: ModelType,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None,
    config: TransformerConfig,
    encoder_decoder_xattn: bool,
) -> list[tuple[int, ...]]:
    """Shapes [s/cp/sp, b, h] of the tensors that pipeline stage `rank` sends forward.

    Stages of an encoder send its hidden state; stages of a decoder send theirs and pass the encoder's on.
    """

    def local(length: int) -> int:
        length //= parallel_state.get_context_parallel_world_size()
        if config.sequence_parallel:
            length //= parallel_state.get_tensor_model_parallel_world_size()
        return length

    encoder = (local(seq_length), micro_batch_size, config.hidden_size)
    if model_type != ModelType.encoder_and_decoder or parallel_state.is_inside_encoder(rank):
        return [encoder]
    decoder = (local(decoder_seq_length or seq_length), micro_batch_size, config.hidden_size)
    return [decoder, encoder] if encoder_decoder_xattn else [decoder]


def clear_embedding_activation_buffer(config: TransformerConfig, model: Chunks) -> Any:
    """Forget the activations kept for a deferred embedding gradient (`--defer-embedding-wgrad-compute`).

    Returns the module that keeps them, for `finish_embedding_wgrad_compute`: None away from the last stage or without it.
    """
    if not (
        config.defer_embedding_wgrad_compute and parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    ):
        return None
    last = model[-1] if isinstance(model, Sequence) else model
    module = get_attr_wrapped_model(last, "post_process", return_model_obj=True)
    module.embedding_activation_buffer.clear()
    return module


def finish_embedding_wgrad_compute(config: TransformerConfig, embedding_module: Any) -> None:
    """Compute the embedding gradients that were put off to the pipeline's cool-down; nothing is done for None."""
    if embedding_module is None:
        return
    weight = embedding_module.shared_embedding_or_output_weight()
    if not embedding_module.share_embeddings_and_output_weights:
        weight = embedding_module.output_layer.weight
    drain_embedding_wgrad_compute(
        config, embedding_module.embedding_activation_buffer, embedding_module.grad_output_buffer, weight
    )


def _stage() -> int:
    return parallel_state.get_pipeline_model_parallel_rank()


def _stages() -> int:
    return parallel_state.get_pipeline_model_parallel_world_size()


def _only(value: Any, what: str) -> list[Any]:
    """The single element of a list or the value itself, as a list; InvariantError if there are several."""
    if not isinstance(value, (list, tuple)):
        return [value]
    if len(value) != 1:
        raise InvariantError(
            f"this schedule takes one {what}",
            f"it got {len(value)}, which need a virtual pipeline",
            "pass virtual_pipeline_model_parallel_size to initialize_model_parallel",
        )
    return list(value)


def _one_each(data_iterators: Any, chunks: int) -> list[Any]:
    """The iterator of each chunk; None serves stages that read no data.

    Every chunk reads the same microbatches, so chunks that shared one iterator would each get a part of them:
    InvariantError for an iterator outside a list, ScheduleError for another number of them.
    """
    if data_iterators is None:
        return [None] * chunks
    if isinstance(data_iterators, (list, tuple)) and len(data_iterators) == chunks:
        return list(data_iterators)
    error = ScheduleError if isinstance(data_iterators, (list, tuple)) else InvariantError
    raise error(
        "data_iterator",
        f"the interleaved schedule takes a list with one iterator for each of the {chunks} model chunks",
        "make as many iterators over the same data",
    )


# ---- transfers of lists of tensors, under their classic names ----------------------------------------------------------


def recv_forward(tensor_shapes: list[Shape], config: TransformerConfig) -> Tensors:
    """One activation per shape from the previous stage."""
    return [p2p_communication.recv_forward(shape, config) for shape in tensor_shapes]


def recv_backward(tensor_shapes: list[Shape], config: TransformerConfig) -> Tensors:
    """One gradient per shape from the next stage."""
    return [p2p_communication.recv_backward(shape, config) for shape in tensor_shapes]


def send_forward(output_tensors: Any, tensor_shapes: list[Shape], config: TransformerConfig) -> None:
    """Activations to the next stage."""
    for tensor, _ in zip(_as_tensors(output_tensors), tensor_shapes):
        p2p_communication.send_forward(tensor, config)


def send_backward(input_tensor_grads: Any, tensor_shapes: list[Shape], config: TransformerConfig) -> None:
    """Gradients to the previous stage."""
    for tensor, _ in zip(_as_tensors(input_tensor_grads), tensor_shapes):
        p2p_communication.send_backward(tensor, config)


def send_forward_recv_backward(
    output_tensors: Any, tensor_shapes: list[Shape], config: TransformerConfig
) -> Tensors:
    """Activations to, and gradients from, the next stage."""
    return [
        p2p_communication.send_forward_recv_backward(tensor, shape, config)
        for tensor, shape in zip(_as_tensors(output_tensors), tensor_shapes)
    ]


def send_backward_recv_forward(
    input_tensor_grads: Any, tensor_shapes: list[Shape], config: TransformerConfig
) -> Tensors:
    """Gradients to, and activations from, the previous stage."""
    return [
        p2p_communication.send_backward_recv_forward(tensor, shape, config)
        for tensor, shape in zip(_as_tensors(input_tensor_grads), tensor_shapes)
    ]


def _as_tensors(value: Tensor | list[Tensor]) -> list[Tensor]:
    return value if isinstance(value, list) else [value]
