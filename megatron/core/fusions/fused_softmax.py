"""softmax(scale * scores) under a mask, for explicit attention scores [b, np, sq, sk]."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron.core import device
from megatron.core.errors import InvariantError
from megatron.core.kernels.registry import Spec, register, select

if TYPE_CHECKING:
    from megatron.core.transformer.enums import AttnMaskType

#: v0.9 fills masked scores with this, so a fully masked row becomes uniform, never NaN.
MASKED_SCORE = -10000.0


def causal_mask(sq: int, sk: int, device: torch.device) -> Tensor:
    """bool [sq, sk], True where a query may not look: the last query sees every key."""
    return torch.ones(sq, sk, dtype=torch.bool, device=device).triu_(1 + sk - sq)


def masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Eager reference. scores [b, np, sq, sk], mask bool broadcastable (True = masked) -> probabilities,
    same shape and dtype.

    Computed in fp32. A row without any visible key gives zeros.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    hidden = mask
    if causal:
        above = causal_mask(scores.shape[-2], scores.shape[-1], scores.device)
        hidden = above if hidden is None else hidden | above
    if hidden is None:
        return torch.softmax(wide, dim=-1).to(scores.dtype)
    probs = torch.softmax(wide.masked_fill(hidden, float("-inf")), dim=-1)
    return torch.where(hidden.all(-1, keepdim=True), 0.0, probs).to(scores.dtype)


@register("masked_softmax", "torch", rank=0)
def _load() -> Any:
    return masked_softmax


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (probs,) = ctx.saved_tensors
    inner = torch._softmax_backward_data(grad.contiguous(), probs, -1, probs.dtype)
    return inner * ctx.scale


class ScaledUpperTriangMaskedSoftmax(torch.autograd.Function):
    """softmax(scale * x) with the strict upper triangle masked; saves the probabilities alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, scale: float) -> Tensor:
        """inputs [attention batches, sq, sk] -> the same shape."""
        probs = masked_softmax(inputs, None, scale, True)
        ctx.save_for_backward(probs)
        ctx.scale = scale
        return probs

    @staticmethod
    def backward(ctx: Any, output_grads: Tensor) -> tuple[Tensor, None]:
        """output_grads [attention batches, sq, sk] -> gradient of inputs."""
        return _backward(ctx, output_grads), None


class ScaledMaskedSoftmax(torch.autograd.Function):
    """softmax(scale * x) under an arbitrary mask; saves the probabilities alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: Tensor, scale: float) -> Tensor:
        """inputs [b, np, sq, sk], mask broadcastable -> [b, np, sq, sk]."""
        probs = masked_softmax(inputs, mask, scale, False)
        ctx.save_for_backward(probs)
        ctx.scale = scale
        return probs

    @staticmethod
    def backward(ctx: Any, output_grads: Tensor) -> tuple[Tensor, None, None]:
        """output_grads [b, np, sq, sk] -> gradient of inputs."""
        return _backward(ctx, output_grads), None, None


class ScaledSoftmax(torch.autograd.Function):
    """softmax(scale * x) without a mask; saves the probabilities alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, scale: float) -> Tensor:
        """inputs [b, np, sq, sk] -> [b, np, sq, sk]."""
        probs = masked_softmax(inputs, None, scale, False)
        ctx.save_for_backward(probs)
        ctx.scale = scale
        return probs

    @staticmethod
    def backward(ctx: Any, output_grads: Tensor) -> tuple[Tensor, None]:
        """output_grads [b, np, sq, sk] -> gradient of inputs."""
        return _backward(ctx, output_grads), None


class FusedScaleMaskSoftmax(nn.Module):
    """Scale, mask and softmax of attention scores, under the constructor of v0.9.

    The fused path runs where the fusion is on, scores are half precision, the mask allows it and a fused
    kernel is available; otherwise the torch path: optional fp32, `mask_func` (fills with -10000), softmax,
    back to the input's dtype.
    """

    def __init__(
        self,
        input_in_fp16: bool,
        input_in_bf16: bool,
        attn_mask_type: AttnMaskType,
        scaled_masked_softmax_fusion: bool,
        mask_func: Callable[[Tensor, Tensor], Tensor],
        softmax_in_fp32: bool,
        scale: float | None,
    ) -> None:
        super().__init__()
        if input_in_fp16 and input_in_bf16:
            raise InvariantError(
                "input_in_fp16 and input_in_bf16", "scores have one dtype", "set one of them"
            )
        if scale is not None and not softmax_in_fp32:
            raise InvariantError(
                "scale", "the scaled scores would overflow in half precision", "set softmax_in_fp32=True"
            )
        self.input_in_fp16, self.input_in_bf16 = input_in_fp16, input_in_bf16
        self.input_in_float16 = input_in_fp16 or input_in_bf16
        self.attn_mask_type = attn_mask_type
        self.mask_func = mask_func
        self.softmax_in_fp32 = softmax_in_fp32
        self.scale = scale
        self.scaled_masked_softmax_fusion = scaled_masked_softmax_fusion
        self._fused: Callable[..., Tensor] | None = None
        if scaled_masked_softmax_fusion and self.input_in_float16 and device.available():
            dtype = torch.float16 if input_in_fp16 else torch.bfloat16
            self._fused = select("masked_softmax", Spec("cuda", dtype))

    def forward(self, input: Tensor, mask: Tensor | None) -> Tensor:
        """input [b, np, sq, sk], mask bool broadcastable or None -> probabilities [b, np, sq, sk]."""
        if input.dim() != 4:
            raise InvariantError("attention scores", f"are [b, np, sq, sk], not {tuple(input.shape)}")
        if self.is_kernel_available(mask, *input.shape):
            return self.forward_fused_softmax(input, mask)
        return self.forward_torch_softmax(input, mask)

    def _hides_the_future(self, input: Tensor, mask: Tensor | None) -> bool:
        """Whether the causal rule applies: no mask is given, and one query alone (from a cache) may see every key."""
        if self.attn_mask_type.name != "causal" or mask is not None or input.shape[-2] == 1:
            return False
        if input.shape[-2] != input.shape[-1]:
            raise InvariantError(
                "attention scores",
                f"of {input.shape[-2]} queries and {input.shape[-1]} keys have no causal order of their own",
                "give a mask",
            )
        return True

    def is_kernel_available(self, mask: Tensor | None, b: int, np: int, sq: int, sk: int) -> bool:
        """Whether the fused path will serve scores of this shape (the registry's kernels take every shape)."""
        return self._fused is not None

    def forward_fused_softmax(self, input: Tensor, mask: Tensor | None) -> Tensor:
        """input [b, np, sq, sk] -> [b, np, sq, sk] by the chosen kernel."""
        fused = self._fused or masked_softmax
        causal = self._hides_the_future(input, mask)
        return fused(input, mask, 1.0 if self.scale is None else self.scale, causal)

    def forward_torch_softmax(self, input: Tensor, mask: Tensor | None) -> Tensor:
        """input [b, np, sq, sk] -> [b, np, sq, sk] in plain torch."""
        scores = input.float() if self.input_in_float16 and self.softmax_in_fp32 else input
        if self.scale is not None:
            scores = scores * self.scale
        if self._hides_the_future(input, mask):
            mask = causal_mask(input.shape[-2], input.shape[-1], input.device)
        probs = torch.softmax(self.mask_func(scores, mask) if mask is not None else scores, dim=-1)
        return probs.to(input.dtype)

    @staticmethod
    def get_batch_per_block(sq: int, sk: int, b: int, np: int) -> int:
        """Score rows that v0.9's CUDA kernel handles per 128-thread block for keys of length `sk`."""
        padded = 1 << max(sk - 1, 0).bit_length()
        warp = min(padded, 32)
        return (128 // warp) * (2 if padded <= 128 else 1)
