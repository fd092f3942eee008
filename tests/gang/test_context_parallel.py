"""Ring and all-to-all attention over a divided sequence against softmax attention over the whole one."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.context_parallel import all_to_all_attention, choose_attention, ring_attention
from megatron.core.context_parallel.split import document_runs, join, take
from megatron.core.fusions.core_attention import AttentionSpec
from megatron.core.packed_seq_params import PackedSeqParams
from tests.gang.harness import run_gang


def _reference(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """[s, b, np, d] -> [s, b, np, d], straight from the definition; hidden bool [b or 1, 1, s, s]."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeat, dim=2) for t in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, v)


def _hidden(s: int, batch: int, kind: str) -> Tensor:
    distance = torch.arange(s) - torch.arange(s).unsqueeze(1)  # key - query
    hidden = torch.zeros(s, s, dtype=torch.bool)
    if kind in ("causal", "packed", "window"):
        hidden |= distance > 0
    if kind == "window":
        hidden |= distance < -5
    if kind == "packed":
        document = torch.bucketize(torch.arange(s), torch.tensor(_edges(s)[1:]), right=True)
        hidden |= document.unsqueeze(1) != document
    if kind == "mask":
        generator = torch.Generator().manual_seed(1)
        hidden = torch.rand(batch, 1, s, s, generator=generator) < 0.4
        return hidden & ~torch.eye(s, dtype=torch.bool)
    return hidden.view(1, 1, s, s)


def _edges(s: int) -> list[int]:
    return [0, 3, s // 4 + 1, s // 2, s // 2, s - 5, s]


def _attention_case(
    algorithm: str, kind: str, heads: int, groups: int, dtype: torch.dtype, s: int
) -> list[float]:
    """Largest deviations of output, dq, dk, dv relative to the largest reference value."""
    cp = dist.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    rank = parallel_state.get_context_parallel_rank()
    batch = 1 if kind == "packed" else 2
    torch.manual_seed(11)
    whole = [torch.randn(s, batch, n, 8, dtype=dtype) for n in (heads, groups, groups, heads)]
    hidden = _hidden(s, batch, kind)

    references = [t.double().requires_grad_() for t in whole[:3]]
    expected = _reference(*references, hidden)
    expected_grads = torch.autograd.grad(expected, references, whole[3].double())

    shards = [take(t, 0, cp, rank).clone().requires_grad_() for t in whole[:3]]
    packed = None
    if kind == "packed":
        edges = torch.tensor(_edges(s), dtype=torch.int32)
        packed = PackedSeqParams("thd", edges, edges, s, s)
    spec = AttentionSpec(
        dtype=dtype, head_dim=8, heads=heads, groups=groups, context_parallel=cp, causal=kind != "mask"
    )
    attend = choose_attention(algorithm, spec, parallel_state.get_context_parallel_group())
    output = attend(
        *shards,
        take(hidden, 2, cp, rank) if kind == "mask" else None,
        causal=kind in ("causal", "packed", "window"),
        scale=1 / math.sqrt(8),
        packed=packed,
        window=(5, 0) if kind == "window" else None,
    )
    grads = torch.autograd.grad(output, shards, take(whole[3], 0, cp, rank).flatten(2))

    def deviation(mine: Tensor, reference: Tensor) -> float:
        part = take(reference, 0, cp, rank)
        return ((mine.double() - part.view(mine.shape)).abs().max() / reference.abs().max()).item()

    pairs = [(output, expected), *zip(grads, expected_grads)]
    return [deviation(mine, reference.detach()) for mine, reference in pairs]


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("algorithm", ["ring", "a2a"])
@pytest.mark.parametrize("kind", ["causal", "full", "packed", "window", "mask"])
def test_divided_attention_equals_whole_attention(cp: int, algorithm: str, kind: str) -> None:
    for heads, groups in ((4, 4), (4, 2), (8, 1)):
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            for deviations in run_gang(cp, _attention_case, algorithm, kind, heads, groups, dtype, 64):
                assert max(deviations) < bound, (heads, groups, dtype, deviations)


@pytest.mark.parametrize("kind", ["causal", "packed", "mask"])
def test_tiles_larger_than_one(kind: str) -> None:
    """A shard of several tiles: 1,200 tokens on 2 ranks, 128 queries a tile."""
    for deviations in run_gang(2, _attention_case, "ring", kind, 4, 2, torch.float64, 1200):
        assert max(deviations) < 1e-12, deviations


def test_half_precision_sums_in_fp32() -> None:
    for deviations in run_gang(2, _attention_case, "ring", "causal", 4, 2, torch.bfloat16, 64):
        assert max(deviations) < 6e-3, deviations  # rounding of inputs' products' result: 2^-8


def _documents_split_one_by_one() -> float:
    """Every document is divided by itself, as user data loaders for packed rows do."""
    cp = dist.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    rank = parallel_state.get_context_parallel_rank()
    edges = [0, 8, 24, 24, 64]
    torch.manual_seed(3)
    q, k, v = (torch.randn(64, 1, 4, 8, dtype=torch.float64) for _ in range(3))
    places = torch.arange(64)
    document = torch.bucketize(places, torch.tensor(edges[1:]), right=True)
    hidden = (places > places.unsqueeze(1)) | (document.unsqueeze(1) != document)
    mine = torch.cat([places[run.start : run.stop] for run in document_runs(edges, cp, rank)])
    cumulative = torch.tensor(edges, dtype=torch.int32)
    output = ring_attention(
        q[mine],
        k[mine],
        v[mine],
        causal=True,
        scale=1 / math.sqrt(8),
        packed=PackedSeqParams("thd", cumulative, cumulative, 40, 40),
        documents_are_split=True,
    )
    expected = _reference(q, k, v, hidden.view(1, 1, 64, 64))[mine]
    return (output.view(expected.shape) - expected).abs().max().item()


def test_documents_split_one_by_one() -> None:
    assert max(run_gang(2, _documents_split_one_by_one)) < 1e-12


def _same_bytes_twice() -> bool:
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())

    def once() -> tuple[Tensor, ...]:
        torch.manual_seed(5 + dist.get_rank())
        q, k, v = (torch.randn(32, 2, 4, 8, requires_grad=True) for _ in range(3))
        output = ring_attention(q, k, v, causal=True, scale=0.3, dropout_p=0.2)
        return output, *torch.autograd.grad(output, (q, k, v), torch.ones_like(output))

    return all(torch.equal(first, second) for first, second in zip(once(), once()))


def test_ring_repeats_bitwise_with_dropout() -> None:
    assert all(run_gang(4, _same_bytes_twice))


def _dropout_gradient_is_that_of_the_output() -> float:
    """Directional derivative of the output under fixed draws against the backward pass."""
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    torch.manual_seed(7 + dist.get_rank())
    inputs = [torch.randn(16, 1, 2, 4, dtype=torch.float64) for _ in range(3)]
    steps = [torch.randn_like(t) for t in inputs]
    direction = torch.randn(16, 1, 8, dtype=torch.float64)

    def value(epsilon: float, wanted: bool = False) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(1)
        leaves = [(t + epsilon * d).requires_grad_(wanted) for t, d in zip(inputs, steps)]
        return (ring_attention(*leaves, causal=True, scale=0.5, dropout_p=0.3) * direction).sum(), leaves

    loss, leaves = value(0.0, wanted=True)
    grads = torch.autograd.grad(loss, leaves)
    analytic = sum((grad * step).sum() for grad, step in zip(grads, steps))
    numeric = (value(1e-6)[0] - value(-1e-6)[0]) / 2e-6
    both = torch.stack((torch.as_tensor(analytic), numeric))
    dist.all_reduce(both)  # keys of one rank enter the losses of the others
    return (both[0] - both[1]).abs().item() / both[1].abs().item()


def test_dropout_gradient_is_that_of_the_output() -> None:
    assert max(run_gang(2, _dropout_gradient_is_that_of_the_output)) < 1e-7


def _too_many_ranks_for_the_heads() -> None:
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    q, k, v = (torch.randn(8, 1, 3, 4) for _ in range(3))
    attend = functools.partial(all_to_all_attention, attend=None)
    with pytest.raises(ValueError, match="--context-parallel-algo ring"):
        attend(q, k, v, causal=True, scale=1.0)


def test_heads_must_be_divisible_for_all_to_all() -> None:
    run_gang(2, _too_many_ranks_for_the_heads)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_join_undoes_take(size: int) -> None:
    whole = torch.arange(2 * 24 * 3).view(2, 24, 3)
    shards = torch.stack([take(whole, 1, size, rank) for rank in range(size)])
    assert torch.equal(join(shards, dim=1), whole)
