"""The state-space recurrence of Mamba-2 in plain torch: all positions at once, or one step.

Per head, with a state S [hn, n] of n numbers per channel, and dt, B, C that depend on the input:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t

Dao & Gu 2024, arXiv:2405.21060. Axes: `s` sequence, `b` batch, `np` heads, `hn` channels of a head, `ng` groups of heads
that share B and C, `n` numbers of the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.kernels.registry import Spec, register


@dataclass(frozen=True)
class ScanSpec(Spec):
    """What the scans of one mixer will see: channels of a head, numbers of the state per channel."""

    width: int = 64
    state: int = 128


def chunked_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
    operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Eager reference: the recurrence over a whole sequence, in chunks of up to `chunk_size` positions (section 6).

    x [b, s, np, hn], dt [b, s, np] (positive), A [np] (negative), B and C [b, s, ng, n], initial_state
    [b, np, hn, n] (default: zeros) -> y [b, s, np, hn] and the state behind the last position [b, np, hn, n], both in
    fp32 (fp64 for such inputs), in which all is computed. `operands` is the type that an implementation may round the
    operands of its matrix products to, x, B and C among them; this one rounds nothing.

    Within a chunk, y is a masked matrix product like attention's; only one state per chunk is handed on. Beside its
    inputs this takes about 3 b s np (chunk_size) numbers for those products and 2 b np hn n (s / chunk_size) for the
    states. A state per position, b s np hn n numbers, is never made.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    batch, length, heads, width = x.shape
    groups, state_size = B.shape[2:]
    if not x.numel():
        empty = x.new_zeros(batch, heads, width, state_size)
        return x.to(wide), (empty if initial_state is None else initial_state).to(wide)
    chunks = -(-length // chunk_size)
    size = -(-length // chunks)  # chunks as equal as can be, so that little is padded

    def in_chunks(tensor: Tensor, *shape: int) -> Tensor:
        """[b, s, ..] -> [b, c, l, ..]; padded with dt = 0, which leaves the state as it is."""
        missing = chunks * size - length
        if missing:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
        return tensor.to(wide).reshape(batch, chunks, size, *shape)

    per_group = heads // groups
    dt = in_chunks(dt, groups, per_group)  # [b, c, l, g, k]
    B, C = in_chunks(B, groups, state_size), in_chunks(C, groups, state_size)  # [b, c, l, g, n]
    steps = in_chunks(x, groups, per_group, width) * dt.unsqueeze(-1)  # [b, c, l, g, k, hn]
    decay = (dt * A.to(wide).view(groups, per_group)).cumsum(2)  # log of the decay since the chunk's begin

    along = decay.movedim(2, -1)  # [b, c, g, k, l]
    future = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    # Masked before exp: what the future would be multiplied by grows beyond every number.
    between = (along.unsqueeze(-1) - along.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()
    scores = torch.einsum("bclgn,bcmgn->bcglm", C, B).unsqueeze(3)
    y = torch.einsum("bcgklm,bcmgkp->bclgkp", scores * between, steps)

    to_end = (decay[:, :, -1:] - decay).exp()
    added = torch.einsum("bclgn,bclgkp->bcgkpn", B, steps * to_end.unsqueeze(-1))
    kept = decay[:, :, -1].exp()[..., None, None]  # [b, c, g, k, 1, 1]
    state = x.new_zeros(batch, heads, width, state_size) if initial_state is None else initial_state
    state = state.to(wide).view(batch, groups, per_group, width, state_size)
    entering = []
    # Unbound at once: the gradient of every single index would be a tensor of all chunks.
    for faded, fresh in zip(kept.unbind(1), added.unbind(1)):
        entering.append(state)
        state = faded * state + fresh
    before = torch.einsum("bclgn,bcgkpn->bclgkp", C, torch.stack(entering, dim=1))
    y = y + before * decay.exp().unsqueeze(-1)
    y = y.reshape(batch, chunks * size, heads, width)[:, :length]
    return y, state.reshape(batch, heads, width, state_size)


@register("state_space_scan", "torch", rank=0)
def _load() -> Any:
    return chunked_scan


def scan_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence for one position.

    x [b, np, hn], dt [b, np], A [np], B and C [b, ng, n], state [b, np, hn, n] -> y [b, np, hn] and the new state, in
    fp32 (fp64 for such inputs).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dt, A, state = x.to(wide), dt.to(wide), A.to(wide), state.to(wide)
    per_group = x.size(1) // B.size(1)
    B = B.to(wide).repeat_interleave(per_group, dim=1)  # [b, np, n]
    C = C.to(wide).repeat_interleave(per_group, dim=1)
    state = (dt * A).exp()[..., None, None] * state + torch.einsum("bh,bhp,bhn->bhpn", dt, x, B)
    return torch.einsum("bhpn,bhn->bhp", state, C), state


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None) -> Tensor:
    """Each channel's weighted sum over its last k positions, computed in fp32.

    x [b, s, c], weight [c, 1, k], bias [c] or None, before [b, k - 1, c]: the positions before x (default: zeros) ->
    [b, s, c]. A sum of k shifted products: it keeps the layout, which a convolution would transpose twice.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    length, width = x.size(1), weight.size(-1)
    x = F.pad(x, (0, 0, width - 1, 0)) if before is None else torch.cat((before.to(x.dtype), x), dim=1)
    x, taps = x.to(wide), weight.squeeze(1).to(wide)
    total = x[:, :length] * taps[:, 0]
    for shift in range(1, width):
        total = torch.addcmul(total, x[:, shift : shift + length], taps[:, shift])
    return total if bias is None else total + bias.to(wide)
