"""The two losses over a vocabulary divided among 2 and 4 ranks: values and gradients against float64 on one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron.core.fusions.fused_cross_entropy import vocab_cross_entropy
from megatron.core.fusions.linear_cross_entropy import linear_cross_entropy
from tests.gang.harness import run_gang

T, H, V = 13, 10, 24
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def _reference(logits: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The definition: the target keeps 1 - a, every other word gets a / (v - 1); -1 is no word and gives lse."""
    log_probs = torch.log_softmax(logits, dim=-1)
    spread = smoothing / (V - 1)
    loss = -spread * log_probs.sum(-1)
    known = target >= 0
    picked = log_probs.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    lse = torch.logsumexp(logits, dim=-1)
    return torch.where(known, loss - (1 - smoothing - spread) * picked, loss + (1 - smoothing - spread) * lse)


def _error(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    assert mine.shape == wanted.shape
    return ((mine.double() - wanted).abs().max() / wanted.abs().max()).item()


def losses(dtype: torch.dtype, smoothing: float, inplace: bool) -> list[float]:
    """Body: relative errors of (loss, gradient of logits; loss, gradients of hidden states and words)."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(5)
    target = torch.randint(V, (T,))
    if not smoothing:
        target[3] = -1
    weights = torch.randn(T)
    mine = slice(rank * V // ranks, (rank + 1) * V // ranks)

    logits = (torch.randn(T, V) * 4).to(dtype)
    logits[0, 5] = 60.0  # a confident prediction
    whole = logits.clone().double().requires_grad_()
    wanted = _reference(whole, target, smoothing)
    (wanted * weights).sum().backward()
    shard = logits[:, mine].clone().requires_grad_()
    given = shard * 1.0 if inplace else shard  # what is overwritten must not be a leaf
    loss = vocab_cross_entropy(given, target, dist.group.WORLD, smoothing, inplace)
    (loss * weights).sum().backward()
    errors = [_error(loss.detach(), wanted.detach()), _error(shard.grad, whole.grad[:, mine])]

    hidden, words = torch.randn(T, H).to(dtype), torch.randn(V, H).to(dtype)
    hidden64, words64 = (x.clone().double().requires_grad_() for x in (hidden, words))
    wanted = _reference(hidden64 @ words64.t(), target, smoothing)
    (wanted * weights).sum().backward()
    hidden.requires_grad_()
    part = words[mine].clone().requires_grad_()
    loss = linear_cross_entropy(hidden, part, target, dist.group.WORLD, smoothing, chunk_tokens=5)
    (loss * weights).sum().backward()
    dist.all_reduce(hidden.grad)  # each rank has its share
    errors += [_error(loss.detach(), wanted.detach()), _error(hidden.grad, hidden64.grad)]
    return [*errors, _error(part.grad, words64.grad[mine])]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tp", [2, 4])
def test_divided_vocabulary(tp: int, dtype: torch.dtype, smoothing: float, inplace: bool) -> None:
    for errors in run_gang(tp, losses, dtype, smoothing, inplace):
        assert max(errors) < TOLERANCE[dtype], errors
