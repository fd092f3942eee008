"""The chunked scan against the recurrence, position by position in float64: outputs, states and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core.ssm.state_space import causal_conv, chunked_scan, scan_step

BATCH, HEADS, WIDTH, STATE = 2, 6, 5, 7


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, head by head and position by position."""
    per_group = x.size(2) // B.size(2)
    ys = []
    for t in range(x.size(1)):
        heads = []
        for h in range(x.size(2)):
            decay = torch.exp(dt[:, t, h] * A[h])[:, None, None]
            added = dt[:, t, h][:, None, None] * x[:, t, h, :, None] * B[:, t, h // per_group, None, :]
            heads.append(decay * state[:, h] + added)
        state = torch.stack(heads, dim=1)
        ys.append(torch.stack([heads[h] @ C[:, t, h // per_group, :, None] for h in range(x.size(2))], dim=1))
    return torch.stack(ys, dim=1).squeeze(-1), state


def drawn(length: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, dt, A, B, C and a state to begin with."""
    generator = torch.Generator().manual_seed(length + groups)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    drawn = [
        normal(BATCH, length, HEADS, WIDTH),
        normal(BATCH, length, HEADS).exp() * 0.3,
        -normal(HEADS).exp(),
        normal(BATCH, length, groups, STATE),
        normal(BATCH, length, groups, STATE),
        normal(BATCH, HEADS, WIDTH, STATE),
    ]
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 23, 32])
def test_chunks_compute_the_recurrence(length: int, groups: int) -> None:
    ours, reference = drawn(length, groups), drawn(length, groups)
    results = chunked_scan(*ours[:5], chunk_size=8, initial_state=ours[5])
    expected = recurrence(*reference)
    for one, other in zip(results, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    weights = [torch.randn_like(result) for result in expected]
    for outputs in (results, expected):
        sum((weight * output).sum() for weight, output in zip(weights, outputs)).backward()
    for one, other in zip(ours, reference):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunk_size", [1, 5, 128])
def test_no_state_to_begin_with_is_zeros(chunk_size: int) -> None:
    inputs = drawn(13, 2)
    y, state = chunked_scan(*inputs[:5], chunk_size=chunk_size)
    expected, last = recurrence(*inputs[:5], torch.zeros(BATCH, HEADS, WIDTH, STATE, dtype=torch.float64))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, last)


def test_half_precision_is_computed_in_single() -> None:
    """bfloat16 inputs: the result is that of the same numbers in float64, to fp32 rounding."""
    inputs = drawn(40, 2, torch.bfloat16)
    y, state = chunked_scan(*inputs[:5], chunk_size=16)
    assert y.dtype is state.dtype is torch.float32
    expected, last = recurrence(
        *(tensor.double() for tensor in inputs[:5]),
        torch.zeros(BATCH, HEADS, WIDTH, STATE, dtype=torch.float64),
    )
    for result, reference in ((y, expected), (state, last)):
        assert (result - reference).abs().max() < 1e-5 * reference.abs().max()


def test_strong_decay_overflows_nowhere() -> None:
    """exp(dt A) underflows to 0 within a chunk; what the future would be multiplied by must not appear as inf or nan."""
    inputs = drawn(32, 2, torch.float32)
    with torch.no_grad():
        inputs[1].fill_(50.0)
        inputs[2].fill_(-16.0)
    y, _ = chunked_scan(*inputs[:5], chunk_size=32)
    y.sum().backward()
    assert y.isfinite().all() and all(tensor.grad.isfinite().all() for tensor in inputs[:5])
    own = torch.einsum("bshp,bsh->bshp", inputs[0], inputs[1])
    scores = torch.einsum("bsgn,bsgn->bsg", inputs[3], inputs[4]).repeat_interleave(3, 2)
    torch.testing.assert_close(y, own * scores[..., None])  # nothing is left of earlier positions


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_step_is_a_position_of_the_recurrence(groups: int) -> None:
    x, dt, A, B, C, state = drawn(4, groups)
    expected, last = recurrence(x, dt, A, B, C, state)
    for t in range(4):
        y, state = scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        torch.testing.assert_close(y, expected[:, t])
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 3, 10])
def test_convolution_looks_back_only(length: int, bias: bool) -> None:
    """Against torch's convolution; what came before is its left padding."""
    channels, width = 6, 4
    conv = torch.nn.Conv1d(channels, channels, width, groups=channels, bias=bias, dtype=torch.float64)
    x = torch.randn(2, width - 1 + length, channels, dtype=torch.float64)
    expected = conv(x.transpose(1, 2)).transpose(1, 2)
    before, new = x[:, : width - 1], x[:, width - 1 :]
    torch.testing.assert_close(causal_conv(new, conv.weight, conv.bias, before), expected)
    fresh = conv(torch.nn.functional.pad(new, (0, 0, width - 1, 0)).transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(causal_conv(new, conv.weight, conv.bias), fresh)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and func is not torch.ops.aten.expand.default:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_state_per_position_is_made() -> None:
    """Forward and backward: nothing as large as positions x heads x channels x state."""
    length, heads, width, state, chunk = 512, 2, 16, 64, 32
    x = torch.randn(1, length, heads, width, requires_grad=True)
    dt = torch.rand(1, length, heads, requires_grad=True)
    A = -torch.rand(heads)
    B, C = (torch.randn(1, length, 1, state, requires_grad=True) for _ in range(2))
    with _Largest() as largest:
        y, _ = chunked_scan(x, dt, A, B, C, chunk)
        y.sum().backward()
    documented = max(length * heads * chunk, length // chunk * heads * width * state, length * heads * width)
    assert largest.elements <= 2 * documented < length * heads * width * state / 8
