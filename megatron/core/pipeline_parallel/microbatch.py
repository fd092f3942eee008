"""Forward and backward of one microbatch through one model chunk: what a schedule repeats."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.variable import Variable

from megatron.core import device, parallel_state
from megatron.core.enums import ModelType
from megatron.core.errors import InvariantError
from megatron.core.timers import timed
from megatron.core.transformer.moe.aux_losses import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_type

Tensors = list[Tensor | None]


def deallocate_output_tensor(out: Tensor | None, deallocate_pipeline_outputs: bool = False) -> None:
    """Free the data of an activation that has been sent: its autograd node is all that backward still needs.

    The tensor keeps its identity and its `grad_fn`; its data becomes one element. Views cannot be emptied (InvariantError).
    """
    if out is None or not deallocate_pipeline_outputs:
        return
    if out._base is not None:
        raise InvariantError(
            "a pipeline output", "is a view, which keeps its base alive", "wrap it in make_viewless_tensor"
        )
    out.data = torch.empty((1,), device=out.device, dtype=out.dtype)


def custom_backward(output: Tensor, grad_output: Tensor | None) -> None:
    """Backward from an output emptied by `deallocate_output_tensor`.

    `torch.autograd.backward` insists on equal shapes of output and gradient; the engine itself does not.
    """
    if output.numel() != 1:
        raise InvariantError(
            "custom_backward",
            f"is for outputs emptied by deallocate_output_tensor, not for {output.numel()} values",
        )
    if grad_output is None:
        grad_output = torch.ones_like(output, memory_format=torch.preserve_format)
    Variable._execution_engine.run_backward(
        tensors=(output,),
        grad_tensors=(grad_output,),
        keep_graph=False,
        create_graph=False,
        inputs=(),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def set_current_microbatch(model: torch.nn.Module, microbatch_id: int) -> None:
    """Tell the decoder which microbatch it runs (captured graphs index by it); other models do not care."""
    decoder = getattr(model, "decoder", None)
    for layer in getattr(decoder, "layers", ()):
        layer.current_microbatch = microbatch_id


def forward_step(
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: torch.nn.Module,
    num_microbatches: int,
    input_tensor: Tensor | Tensors | None,
    forward_data_store: list[Any],
    config: TransformerConfig,
    collect_non_loss_data: bool = False,
    checkpoint_activations_microbatch: bool | None = None,
    is_first_microbatch: bool = False,
    current_microbatch: int | None = None,
    encoder_decoder_xattn: bool = False,
) -> tuple[Tensor | Tensors, Tensor]:
    """Run `forward_step_func` on one microbatch; on the last stage also the loss (spec: training, section 14).

    `input_tensor` [s, b, h] is what the previous stage sent, None on the first; given as a list, the result is a list too.
    Returns the stage's output and the number of tokens of this microbatch (0 away from the last stage). On the last stage
    the output is the loss to differentiate, divided by tokens and microbatches unless `config.calculate_per_token_loss`.
    """
    with timed(config, "forward-compute", 2):
        tell_first: Callable[[], None] | None = getattr(model, "set_is_first_microbatch", None)
        if is_first_microbatch and tell_first is not None:
            tell_first()
        if current_microbatch is not None:
            set_current_microbatch(model, current_microbatch)

        as_list = isinstance(input_tensor, list)
        inputs: Tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        get_attr_wrapped_model(model, "set_input_tensor")(inputs)

        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if config.enable_autocast:
            autocast = torch.autocast(device.kind(), dtype=config.autocast_dtype)
        with autocast:
            if checkpoint_activations_microbatch is None:
                output, loss_func = forward_step_func(data_iterator, model)
            else:
                output, loss_func = forward_step_func(data_iterator, model, checkpoint_activations_microbatch)

        num_tokens = torch.zeros((), dtype=torch.int, device=device.current())
        if parallel_state.is_pipeline_last_stage():
            if collect_non_loss_data:
                forward_data_store.append(loss_func(output, non_loss_data=True))
            else:
                output, num_tokens, reduced = _loss(loss_func(output), num_microbatches, config)
                forward_data_store.append(reduced)

    # Users drive schedules with a plain ModelParallelConfig too, which knows no experts.
    if getattr(config, "num_moe_experts", None) is not None:
        # The auxiliary losses of the experts enter backward beside the main loss and need its scale.
        scale = torch.ones(1, device=output.device)
        if config.grad_scale_func is not None:
            scale = config.grad_scale_func(scale)
        MoEAuxLossAutoScaler.set_loss_scale(scale / num_microbatches)

    decoder_needs_memory = (
        get_model_type(model) == ModelType.encoder_and_decoder
        and encoder_decoder_xattn
        and parallel_state.is_inside_decoder()
    )
    if decoder_needs_memory:  # hand the encoder's output on to the next decoder stage
        return [output, inputs[-1]], num_tokens
    return ([output] if as_list else output), num_tokens


def _loss(result: Any, num_microbatches: int, config: TransformerConfig) -> tuple[Tensor, Tensor, Any]:
    """The loss to differentiate, the token count and the values to report, from either form of loss function result."""
    if len(result) == 3:
        loss, num_tokens, reduced = result
        if not config.calculate_per_token_loss:
            loss = loss / num_tokens / num_microbatches
        return loss, num_tokens, reduced
    loss, reduced = result
    return loss / num_microbatches, torch.tensor(0, dtype=torch.int), reduced


def backward_step(
    input_tensor: Tensor | Tensors | None,
    output_tensor: Tensor | Tensors,
    output_tensor_grad: Tensor | Tensors | None,
    model_type: ModelType,
    config: TransformerConfig,
) -> Tensor | Tensors | None:
    """Back-propagate one microbatch; returns the gradient of `input_tensor` (None on the first stage).

    Without a gradient for the output (the last stage) the output is the loss, scaled by `config.grad_scale_func`.
    """
    with timed(config, "backward-compute", 2):
        as_list = isinstance(input_tensor, list)
        inputs: Tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        outputs: Tensors = output_tensor if isinstance(output_tensor, list) else [output_tensor]
        grads: Tensors = output_tensor_grad if isinstance(output_tensor_grad, list) else [output_tensor_grad]
        for tensor in inputs:
            if tensor is not None:
                tensor.retain_grad()

        output = outputs[0]
        if output is None:
            raise ValueError("backward_step needs the output of the forward step")
        if grads[0] is None and config.grad_scale_func is not None:
            output = config.grad_scale_func(output)
        if config.deallocate_pipeline_outputs and grads[0] is not None:
            custom_backward(output, grads[0])
        elif output.requires_grad:
            torch.autograd.backward(output, grad_tensors=grads[0])

        input_grads: Tensors = [None if tensor is None else tensor.grad for tensor in inputs]
        if len(grads) > 1 and grads[1] is not None and inputs[-1] is not None:
            # The encoder's output passes through decoder stages untouched: later stages' gradient adds to this one's.
            passed = input_grads[-1]
            input_grads[-1] = grads[1] if passed is None else passed.add_(grads[1])
    return input_grads if as_list else input_grads[0]


def check_first_val_step(first_val_step: bool | None, forward_only: bool, cond: bool) -> bool:
    """Whether a microbatch is the first since the weights changed: in validation only that of the first step is."""
    if first_val_step is not None and forward_only:
        return first_val_step and cond
    return cond
