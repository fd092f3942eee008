"""Independent float64 references of every operation and the comparison that kernels must pass.

The references are written from the definitions with plain torch in float64 and differentiated by autograd;
nothing here is imported from the implementations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# ||got - want|| / ||want||: a few units of rounding of the narrowest number in the computation
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def distance(got: Tensor, want: Tensor) -> float:
    """Relative distance in the Frobenius norm; infinite where a NaN or infinity stands that the reference
    does not have.
    """
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    if not torch.isfinite(got).all():
        return float("inf")
    if want.numel() == 0:
        return 0.0
    return float((got - want).norm() / want.norm().clamp_min(1e-6 * max(want.numel(), 1) ** 0.5))


def close(got: Tensor, want: Tensor, dtype: torch.dtype, slack: float = 1.0, what: str = "") -> None:
    """Assert that `got`, computed in `dtype`, is within rounding of `want`."""
    error = distance(got, want)
    assert error <= TOLERANCE[dtype] * slack, (
        f"{what}: relative error {error:.2e} > {TOLERANCE[dtype] * slack:.1e}"
    )


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """Standard normal numbers of a given seed, already rounded to `dtype`."""
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .to(dtype)
        .to(device)
    )


def check(
    function: Callable[..., Tensor | Sequence[Tensor]],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    slack: float = 1.0,
) -> None:
    """Compare values and the gradients of every floating input with `reference` evaluated in float64 on the
    same numbers.
    """
    own = [None if t is None else t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    wide = [
        None if t is None else (t.double().cpu().requires_grad_() if t.is_floating_point() else t.cpu())
        for t in inputs
    ]
    # a function may keep strides: hand over a view with the strides of the input
    own = [
        o if t is None or t.is_contiguous() or o is None else _with_strides_of(t) for o, t in zip(own, inputs)
    ]
    got, want = function(*own), reference(*wide)
    got = [got] if isinstance(got, Tensor) else list(got)
    want = [want] if isinstance(want, Tensor) else list(want)
    upstream = [noise(*w.shape, seed=99 + i) for i, w in enumerate(want)]
    upstream = [u.to(g.dtype) for u, g in zip(upstream, got)]
    for i, (g, w) in enumerate(zip(got, want)):
        close(g, w, dtype, slack, f"output {i}")
    leaves = [(i, o, w) for i, (o, w) in enumerate(zip(own, wide)) if o is not None and o.requires_grad]
    got_grads = torch.autograd.grad(
        got, [o for _, o, _ in leaves], [u.to(g.device) for u, g in zip(upstream, got)]
    )
    want_grads = torch.autograd.grad(want, [w for _, _, w in leaves], [u.double() for u in upstream])
    for (i, o, _), g, w in zip(leaves, got_grads, want_grads):
        assert g.dtype == o.dtype, f"gradient {i} has dtype {g.dtype}, its input {o.dtype}"
        close(g, w, dtype, slack, f"gradient of input {i}")


def _with_strides_of(t: Tensor) -> Tensor:
    view = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
    return view.requires_grad_(t.is_floating_point())


# --- definitions ------------------------------------------------------------------------------------------
# ---------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + eps) * (weight + 1 if zero_centered else weight)
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * (weight + 1 if zero_centered else weight)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gated(x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    half = x.shape[-1] // 2
    return activation(x[..., :half]) * x[..., half:]


def masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    hidden = torch.zeros(scores.shape, dtype=torch.bool)
    if mask is not None:
        hidden = hidden | mask.cpu()
    if causal:
        sq, sk = scores.shape[-2:]
        hidden = hidden | (torch.arange(sk)[None, :] > torch.arange(sq)[:, None] + sk - sq)
    weights = torch.exp(scores * scale - (scores * scale).amax(-1, keepdim=True).detach()) * ~hidden
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)


def rope(t: Tensor, freqs: Tensor, interleaved: bool, positions: Tensor | None) -> Tensor:
    """Each pair is a complex number, multiplied by exp(i angle)."""
    table = freqs.reshape(freqs.shape[0], -1).cpu().double()
    table = table[: t.shape[0]] if positions is None else table[positions]
    d = table.shape[-1]
    one = t[..., 0:d:2] if interleaved else t[..., : d // 2]
    two = t[..., 1:d:2] if interleaved else t[..., d // 2 : d]
    angle = table[:, 0::2] if interleaved else table[:, : d // 2]
    while angle.dim() < t.dim():
        angle = angle.unsqueeze(1)
    turned = torch.complex(one, two) * torch.polar(torch.ones_like(angle), angle)
    pair = (turned.real, turned.imag)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((out, t[..., d:]), -1)


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    vocab = logits.shape[-1]
    # the target has 1 - smoothing, every other class smoothing / (v - 1)
    goal = torch.full_like(log_probs, smoothing / (vocab - 1)) if smoothing else torch.zeros_like(log_probs)
    goal.scatter_(-1, target.unsqueeze(-1), 1 - smoothing)
    return -(goal * log_probs).sum(-1)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None, blind: str) -> Tensor:
    """q [sq, b, np, hn]; k, v [sk, b, ng, hn]; hidden bool [b or 1, 1, sq, sk]; rows that see nothing:
    'mean' of v or 'zero'.
    """
    repeat = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeat, dim=2) for t in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * scale
    if hidden is None:
        hidden = torch.zeros(1, 1, q.shape[0], k.shape[0], dtype=torch.bool)
    probs = masked_softmax(scores, hidden.cpu(), 1.0, False)
    if blind == "mean":
        nothing = hidden.cpu().all(-1, keepdim=True)
        probs = torch.where(nothing, 1.0 / k.shape[0], probs)
    return torch.einsum("bhij,jbhd->ibhd", probs, v).reshape(q.shape[0], q.shape[1], -1)


def state_space_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """x [b, s, np, hn], dt [b, s, np], A [np], B, C [b, s, ng, n], state [b, np, hn, n]: position by position."""
    share = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(share, dim=2) for t in (B, C))
    rows = []
    for t in range(x.shape[1]):
        added = (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * B[:, t, :, None, :]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + added
        rows.append((state * C[:, t, :, None, :]).sum(-1))
    return torch.stack(rows, dim=1), state


@dataclass(frozen=True)
class AttentionCase:
    """One shape and restriction of attention."""

    name: str
    sq: int
    sk: int
    heads: int
    groups: int
    width: int
    batch: int = 1
    causal: bool = True
    documents: tuple[int, ...] = ()
    window: tuple[int, int] | None = None
    padding: bool = False  # key padding mask of different lengths
    blind: bool = False  # some queries see nothing

    def hidden(self) -> Tensor | None:
        """The restriction from its definition, pair by pair."""
        mask = torch.zeros(self.batch, 1, self.sq, self.sk, dtype=torch.bool)
        doc = [i for i, n in enumerate(self.documents) for _ in range(n)]
        for i in range(self.sq):
            level = i + self.sk - self.sq
            for j in range(self.sk):
                bad = self.causal and j > level
                bad |= bool(self.documents) and doc[i] != doc[j]
                if self.window is not None:
                    bad |= self.window[0] >= 0 and j < level - self.window[0]
                    bad |= self.window[1] >= 0 and j > level + self.window[1]
                mask[:, :, i, j] = bad
        if self.padding:
            mask |= self.mask()
        return mask

    def mask(self) -> Tensor | None:
        """The mask tensor that is passed to the provider."""
        if not self.padding:
            return None
        mask = torch.zeros(self.batch, 1, self.sq, self.sk, dtype=torch.bool)
        for b in range(self.batch):
            mask[b, :, :, self.sk - 1 - b :] = True
            if self.blind:
                mask[b, :, self.sq - 2 - b :, :] = True
        return mask


ATTENTION_CASES = (
    AttentionCase("causal", 37, 37, 4, 4, 16, batch=2),
    AttentionCase("causal_gqa", 33, 33, 4, 2, 24, batch=2),
    AttentionCase("wide_head", 17, 17, 2, 1, 80),
    AttentionCase("whole", 21, 29, 2, 2, 8, batch=2, causal=False),
    AttentionCase("decode", 1, 19, 4, 2, 16, batch=2),
    AttentionCase("prefill_tail", 5, 23, 2, 2, 16),
    AttentionCase("packed", 40, 40, 2, 1, 16, documents=(7, 1, 17, 15)),
    AttentionCase("packed_whole", 30, 30, 2, 2, 16, documents=(9, 21), causal=False),
    AttentionCase("window", 34, 34, 2, 2, 16, window=(5, 0)),
    AttentionCase("window_both", 34, 34, 2, 2, 16, causal=False, window=(3, 6)),
    AttentionCase("padding", 19, 19, 2, 2, 16, batch=2, causal=False, padding=True),
    AttentionCase("padding_causal", 18, 18, 2, 1, 16, batch=2, padding=True),
    AttentionCase("blind_rows", 18, 18, 2, 2, 16, batch=2, causal=False, padding=True, blind=True),
    AttentionCase("long", 160, 160, 2, 1, 16),
)
