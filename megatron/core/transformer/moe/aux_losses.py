"""How auxiliary losses of the experts reach the gradients: they ride on an activation through backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MoEAuxLossAutoScaler(torch.autograd.Function):
    """Identity on an activation whose backward also starts the gradient of an auxiliary loss.

    The main loss gets its scale (loss scale / microbatches) at the end of the pipeline; an auxiliary loss arises inside a
    layer and gets the same scale here, set once per forward by the schedule.
    """

    main_loss_backward_scale: Tensor = torch.tensor(1.0)

    @staticmethod
    def forward(ctx: Any, output: Tensor, aux_loss: Tensor) -> Tensor:
        """output of any shape, aux_loss a scalar -> output unchanged."""
        ctx.save_for_backward(aux_loss)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of `output` passes; that of `aux_loss` is the scale of the main loss."""
        (aux_loss,) = ctx.saved_tensors
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale.to(aux_loss.device)
        return grad_output, torch.ones_like(aux_loss) * scale

    @staticmethod
    def set_loss_scale(scale: Tensor) -> None:
        """Scale of the main loss in backward, a scalar tensor."""
        MoEAuxLossAutoScaler.main_loss_backward_scale = scale
