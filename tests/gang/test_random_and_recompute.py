"""Random states over ranks, and recomputation that gives the gradients of the plain forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    checkpoint,
    gather_split_1d_tensor,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
    reduce_from_tensor_model_parallel_region,
    split_tensor_into_1d_equal_chunks,
)
from tests.gang.harness import run_gang


def _draws() -> tuple[Tensor, Tensor]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(77)
    with get_cuda_rng_tracker().fork():
        forked = torch.rand(4)
    return forked, torch.rand(4)


def test_tensor_ranks_fork_apart_and_share_the_default_state() -> None:
    results = run_gang(4, _draws)
    generators = [torch.Generator().manual_seed(77 + 2718 + rank % 2) for rank in range(4)]
    common = torch.rand(4, generator=torch.Generator().manual_seed(77))
    for (forked, plain), generator in zip(results, generators):
        assert torch.equal(forked, torch.rand(4, generator=generator))
        assert torch.equal(plain, common)


def _block(x: Tensor, weight: Tensor, bias: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    """Draws from both states; like a layer's output, the result is the same on all tensor-parallel ranks."""
    hidden = F.dropout(x * factor, 0.4)
    with get_cuda_rng_tracker().fork():
        hidden = F.dropout(hidden @ weight, 0.3)
    hidden = reduce_from_tensor_model_parallel_region(hidden)
    hidden = torch.tanh(hidden if bias is None else hidden + bias)
    return F.dropout(hidden, 0.2), hidden.detach()


def _recomputed(distribute: bool) -> dict[str, bool]:
    """Two recomputed blocks in sequence, then a plain draw: everything equals the plain run bitwise."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())

    def run(recompute: bool) -> dict[str, Tensor]:
        model_parallel_cuda_manual_seed(5)
        torch.manual_seed(6)
        x, weight, bias = (torch.randn(shape) for shape in ((6, 4, 8), (8, 8), (8,)))
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        entered = leaves[0] * 1.0
        if recompute:
            first, _ = checkpoint(_block, distribute, entered, leaves[1], leaves[2], 1.5)
            saved = entered.numel()
            second, _ = checkpoint(_block, distribute, first, leaves[1], None, 0.5)
        else:
            first, _ = _block(entered, leaves[1], leaves[2], 1.5)
            saved = entered.numel()
            second, _ = _block(first, leaves[1], None, 0.5)
        after = torch.rand(3)
        second.square().sum().backward()
        with get_cuda_rng_tracker().fork():
            forked = torch.rand(3)
        grads = dict(zip(("x", "weight", "bias"), (leaf.grad for leaf in leaves)))
        return {**grads, "output": second.detach(), "after": after, "next": torch.rand(3), "forked": forked,
                "saved": torch.tensor(saved)}  # fmt: skip

    plain, recomputed = run(False), run(True)
    shares = dist.get_world_size() if distribute else 1
    kept = recomputed.pop("saved") * shares == plain.pop("saved")
    return {"kept": bool(kept), **{name: torch.equal(plain[name], recomputed[name]) for name in plain}}


@pytest.mark.parametrize(("ranks", "distribute"), [(1, False), (1, True), (2, False), (2, True)])
def test_recomputation_is_bitwise_the_plain_run(ranks: int, distribute: bool) -> None:
    for equal in run_gang(ranks, _recomputed, distribute):
        assert all(equal.values()), equal


def _argument_of_a_distributed_recomputation() -> torch.Tensor:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    first = torch.arange(16.0).view(4, 4).clone()
    assert torch.equal(
        checkpoint(torch.add, True, first, torch.ones(4, 4)).flatten(), torch.arange(1.0, 17.0)
    )
    return first


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_distributed_recomputation_leaves_flat_shares(ranks: int) -> None:
    shares = run_gang(ranks, _argument_of_a_distributed_recomputation)
    assert [share.shape for share in shares] == [(16 // ranks,)] * ranks
    assert torch.equal(torch.cat(shares), torch.arange(16.0))


def _wrong_use() -> None:
    parallel_state.initialize_model_parallel()
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="backward"):
        torch.autograd.grad(checkpoint(torch.sin, False, x).sum(), x)
    tracker = get_cuda_rng_tracker()
    with pytest.raises(ValueError, match="model_parallel_cuda_manual_seed"), tracker.fork():
        pass
    tracker.add("one", 1)
    with pytest.raises(ValueError, match="seed 1 already exists"):
        tracker.add("two", 1)
    with pytest.raises(ValueError, match="state one already exists"):
        tracker.add("one", 2)


def test_wrong_use_is_explained() -> None:
    run_gang(1, _wrong_use)


def _split_and_gather() -> bool:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    whole = torch.arange(24.0).view(2, 3, 4)
    share = split_tensor_into_1d_equal_chunks(whole, new_buffer=True)
    own = torch.equal(share, torch.arange(24.0).chunk(dist.get_world_size())[dist.get_rank()])
    shares = [gather_split_1d_tensor(share), gather_split_1d_tensor(share.view(2, -1))]
    return own and all(torch.equal(gathered, torch.arange(24.0)) for gathered in shares)


def test_flat_shares() -> None:
    assert all(run_gang(4, _split_and_gather))
