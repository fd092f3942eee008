"""Operations over a list of tensors at once: norms, scaling and optimizer updates (torch's foreach and
fused forms).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.core.kernels.registry import register


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    """fp32 scalar: square root of the sum of squares over all tensors (0 for an empty list), without a host
    sync.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float32)
    norms = torch._foreach_norm(list(tensors), 2.0, dtype=_wide(tensors[0].dtype))
    return torch.linalg.vector_norm(torch.stack(norms)).float()


def scale(sources: Sequence[Tensor], targets: Sequence[Tensor], factor: float | Tensor) -> Tensor:
    """targets[i] = sources[i] * factor (each in its own dtype); returns a fp32 scalar, 1 if any source was
    not finite else 0.
    """
    if not sources:
        return torch.zeros((), dtype=torch.float32)
    aliased = all(source is target for source, target in zip(sources, targets))
    if not aliased:
        torch._foreach_copy_(list(targets), list(sources))
    torch._foreach_mul_(list(targets), factor)
    peak = torch.stack([torch.linalg.vector_norm(t, float("inf")).float() for t in targets if t.numel()])
    return (~torch.isfinite(peak).all()).float()


def clip(tensors: Sequence[Tensor], max_norm: float, total_norm: Tensor) -> None:
    """Multiply all tensors in place by max_norm / (total_norm + 1e-6) where that is below 1; no host sync."""
    if tensors:
        torch._foreach_mul_(list(tensors), (max_norm / (total_norm + 1.0e-6)).clamp_(max=1.0))


def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    bias_correction: bool = True,
) -> None:
    """One Adam(W) update of every parameter in place (arXiv:1412.6980, arXiv:1711.05101); `step` counts
    from 1.

    `decoupled` shrinks the parameter by lr * weight_decay; otherwise the decay is added to the gradient.
    """
    if not params:
        return
    if bias_correction:
        fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
        steps = [torch.full((), float(step), dtype=torch.float32, device=params[0].device)] * len(params)
        fused(
            list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), [], steps,
            lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        return
    wide = [grad.to(param.dtype) for grad, param in zip(grads, params)]
    if weight_decay and not decoupled:
        wide = list(torch._foreach_add(wide, list(params), alpha=weight_decay))
    elif weight_decay:
        torch._foreach_mul_(list(params), 1.0 - lr * weight_decay)
    torch._foreach_lerp_(list(exp_avgs), wide, 1.0 - betas[0])
    torch._foreach_mul_(list(exp_avg_sqs), betas[1])
    torch._foreach_addcmul_(list(exp_avg_sqs), wide, wide, value=1.0 - betas[1])
    roots = torch._foreach_sqrt(list(exp_avg_sqs))
    torch._foreach_add_(roots, eps)
    torch._foreach_addcdiv_(list(params), list(exp_avgs), roots, value=-lr)


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    first_step: bool,
) -> None:
    """One SGD update in place; decay is added to the gradient, momentum buffers start as the first
    gradient.
    """
    if not params:
        return
    wide = [grad.to(param.dtype) for grad, param in zip(grads, params)]
    if weight_decay:
        wide = list(torch._foreach_add(wide, list(params), alpha=weight_decay))
    if momentum:
        if first_step:
            torch._foreach_copy_(list(momenta), wide)
        else:
            torch._foreach_mul_(list(momenta), momentum)
            torch._foreach_add_(list(momenta), wide)
        wide = list(momenta)
    torch._foreach_add_(list(params), wide, alpha=-lr)


@register("l2_norm", "torch", rank=0)
def _load_l2_norm() -> Any:
    return l2_norm


@register("scale", "torch", rank=0)
def _load_scale() -> Any:
    return scale


@register("adam", "torch", rank=0)
def _load_adam() -> Any:
    return adam


@register("sgd", "torch", rank=0)
def _load_sgd() -> Any:
    return sgd
