"""The checks every implementation of an operation must pass, called with the implementation, a dtype and a
device.

The same suites run for the torch implementations on the CPU, for the Triton kernels under Triton's
interpreter, and for both on a GPU. `SUITES[op]` lists (name, function).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.core.packed_seq_params import PackedSeqParams
from tests.kernels import references as ref
from tests.kernels.references import ATTENTION_CASES, AttentionCase, check, close, noise

Implementation = Callable[..., Any]
Suite = Callable[[Implementation, torch.dtype, str], None]

SUITES: dict[str, list[tuple[str, Suite]]] = {}


def suite(op: str, name: str) -> Callable[[Suite], Suite]:
    def enter(function: Suite) -> Suite:
        SUITES.setdefault(op, []).append((name, function))
        return function

    return enter


def _norm_inputs(dtype: torch.dtype, device: str, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    x = noise(*shape, seed=1, dtype=dtype, device=device) * 2 + 0.5
    weight = 1 + 0.3 * noise(shape[-1], seed=2, dtype=dtype, device=device)
    return x, weight, noise(shape[-1], seed=3, dtype=dtype, device=device)


@suite("layer_norm", "values")
def _layer_norm(run: Implementation, dtype: torch.dtype, device: str) -> None:
    for shape in ((3, 2, 33), (1, 1, 64), (5, 3), (65, 320)):
        for centred in (False, True):
            x, weight, bias = _norm_inputs(dtype, device, *shape)
            check(
                lambda x, w, b, z=centred: run(x, w, b, 1e-5, z),
                lambda x, w, b, z=centred: ref.layer_norm(x, w, b, 1e-5, z),
                (x, weight, bias), dtype, slack=2,
            )  # fmt: skip
    x, weight, _ = _norm_inputs(dtype, device, 7, 40)
    check(
        lambda x, w: run(x, w, None, 1e-5),
        lambda x, w: ref.layer_norm(x, w, None, 1e-5, False),
        (x, weight),
        dtype,
        2,
    )


@suite("layer_norm", "strides_and_empty")
def _layer_norm_strides(run: Implementation, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = _norm_inputs(dtype, device, 6, 4, 33)
    check(
        lambda x, w, b: run(x, w, b, 1e-5), lambda x, w, b: ref.layer_norm(x, w, b, 1e-5, False),
        (x.transpose(0, 1), weight, bias), dtype, 2,
    )  # fmt: skip
    assert run(x[:0], weight, bias, 1e-5).shape == (0, 4, 33)


@suite("layer_norm", "wide_residual_stream")
def _layer_norm_mixed(run: Implementation, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = _norm_inputs(dtype, device, 5, 48)
    y = run(x.float() if dtype != torch.float64 else x, weight, bias, 1e-5)
    assert y.dtype == dtype
    close(y, ref.layer_norm(x.double().cpu(), weight.double().cpu(), bias.double().cpu(), 1e-5, False), dtype)


@suite("residual_layer_norm", "values")
def _residual_layer_norm(run: Implementation, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = _norm_inputs(dtype, device, 5, 3, 40)
    other = noise(5, 3, 40, seed=4, dtype=dtype, device=device)
    check(
        lambda x, r, w, b: run(x, r, w, b, 1e-5),
        lambda x, r, w, b: (ref.layer_norm(x + r, w, b, 1e-5, False), x + r),
        (x, other, weight, bias), dtype, 2,
    )  # fmt: skip


@suite("rms_norm", "values")
def _rms_norm(run: Implementation, dtype: torch.dtype, device: str) -> None:
    for shape in ((3, 2, 33), (1, 1, 64), (5, 3), (65, 320)):
        for centred in (False, True):
            x, weight, _ = _norm_inputs(dtype, device, *shape)
            check(
                lambda x, w, z=centred: run(x, w, 1e-5, z), lambda x, w, z=centred: ref.rms_norm(x, w, 1e-5, z),
                (x, weight), dtype, 2,
            )  # fmt: skip
    x, weight, _ = _norm_inputs(dtype, device, 6, 4, 33)
    check(
        lambda x, w: run(x, w, 1e-5),
        lambda x, w: ref.rms_norm(x, w, 1e-5, False),
        (x.transpose(0, 1), weight),
        dtype,
        2,
    )
    assert run(x[:0], weight, 1e-5).shape == (0, 4, 33)


@suite("residual_rms_norm", "values")
def _residual_rms_norm(run: Implementation, dtype: torch.dtype, device: str) -> None:
    x, weight, _ = _norm_inputs(dtype, device, 5, 3, 40)
    other = noise(5, 3, 40, seed=4, dtype=dtype, device=device)
    check(
        lambda x, r, w: run(x, r, w, 1e-5), lambda x, r, w: (ref.rms_norm(x + r, w, 1e-5, False), x + r),
        (x, other, weight), dtype, 2,
    )  # fmt: skip


def _activation(
    run: Implementation, dtype: torch.dtype, device: str, formula: Any, gates: int, bias: bool
) -> None:
    for shape in ((3, 2, 17), (1, 1, 1), (70, 1, 40)):
        x = noise(*shape[:-1], shape[-1] * gates, seed=1, dtype=dtype, device=device) * 2
        b = noise(shape[-1] * gates, seed=2, dtype=dtype, device=device) if bias else None
        # the sum x + bias is rounded before the activation in torch's implementations: an error of one more
        # rounding
        check(
            lambda x, b: run(x, b), lambda x, b: formula(x if b is None else x + b), (x, b), dtype,
            slack=2.5 if dtype != torch.float64 else 4e3,  # v0.9 rounds sqrt(2/pi) to 8 digits
        )  # fmt: skip
    x = noise(0, 2, 6 * gates, seed=1, dtype=dtype, device=device)
    assert run(x, noise(6 * gates, seed=2, dtype=dtype, device=device) if bias else None).shape == (0, 2, 6)
    x = noise(4, 6, 10 * gates, seed=5, dtype=dtype, device=device).transpose(0, 1)
    b = noise(10 * gates, seed=6, dtype=dtype, device=device) if bias else None
    check(
        run,
        lambda x, b: formula(x if b is None else x + b),
        (x, b),
        dtype,
        2.5 if dtype != torch.float64 else 4e3,
    )


@suite("bias_gelu", "values")
def _bias_gelu(run: Implementation, dtype: torch.dtype, device: str) -> None:
    _activation(run, dtype, device, ref.gelu_tanh, 1, True)


@suite("bias_swiglu", "values")
def _bias_swiglu(run: Implementation, dtype: torch.dtype, device: str) -> None:
    for bias in (True, False):
        _activation(run, dtype, device, lambda x: ref.gated(x, lambda g: g * torch.sigmoid(g)), 2, bias)


@suite("bias_swiglu", "fp8_input_store")
def _bias_swiglu_fp8(run: Implementation, dtype: torch.dtype, device: str) -> None:
    x = noise(4, 32, seed=1, dtype=torch.float8_e4m3fn, device=device).to(
        dtype
    )  # exactly representable: nothing is lost
    check(
        lambda x: run(x, None, True), lambda x: ref.gated(x, lambda g: g * torch.sigmoid(g)), (x,), dtype, 2.5
    )


@suite("bias_geglu", "values")
def _bias_geglu(run: Implementation, dtype: torch.dtype, device: str) -> None:
    for bias in (True, False):
        _activation(run, dtype, device, lambda x: ref.gated(x, ref.gelu_tanh), 2, bias)


@suite("bias_dropout_add", "no_dropout")
def _bda(run: Implementation, dtype: torch.dtype, device: str) -> None:
    for bias in (True, False):
        x, other = (noise(5, 3, 36, seed=s, dtype=dtype, device=device) for s in (1, 2))
        b = noise(36, seed=3, dtype=dtype, device=device) if bias else None
        check(
            lambda x, b, r: run(x, b, r, 0.0),
            lambda x, b, r: r + (x if b is None else x + b),
            (x, b, other),
            dtype,
            2,
        )


@suite("bias_dropout_add", "dropout")
def _bda_dropout(run: Implementation, dtype: torch.dtype, device: str) -> None:
    """The mask is read off the output, must be applied to the gradient as well, and drop the stated share."""
    prob = 0.3
    x = torch.full((64, 8, 40), 2.0, dtype=dtype, device=device, requires_grad=True)
    bias = torch.full((40,), 1.0, dtype=dtype, device=device, requires_grad=True)
    residual = noise(64, 8, 40, seed=2, dtype=dtype, device=device).requires_grad_()
    torch.manual_seed(5)
    y = run(x, bias, residual, prob)
    branch = (y - residual).detach()
    kept = branch.abs() > 1.0
    share = 1.0 - kept.double().mean().item()
    assert abs(share - prob) < 4 * (prob * (1 - prob) / x.numel()) ** 0.5, f"dropped {share}"
    wide = 1e6 if dtype == torch.float64 else 20  # the applied probability is a multiple of 2^-16
    close(branch, kept * (3.0 / (1 - prob)), dtype, wide)
    grad = noise(64, 8, 40, seed=3, dtype=dtype, device=device)
    gx, gb, gr = torch.autograd.grad(y, (x, bias, residual), grad)
    want = (grad.double() * kept / (1 - prob)).cpu()
    close(gx, want, dtype, wide)
    close(gb, want.sum((0, 1)), dtype, wide)
    close(gr, grad, dtype)
    torch.manual_seed(5)
    assert torch.equal(run(x, bias, residual, prob), y), "the same generator state must give the same mask"
    assert not torch.equal(run(x, bias, residual, prob), y), "the generator must advance"


@suite("bias_dropout_add", "fp32_residual")
def _bda_wide(run: Implementation, dtype: torch.dtype, device: str) -> None:
    x = noise(4, 12, seed=1, dtype=dtype, device=device).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    residual = noise(4, 12, seed=2, dtype=wide, device=device).requires_grad_()
    for prob in (0.0, 0.5):
        y = run(x, None, residual, prob)
        assert y.dtype == wide
        gx, gr = torch.autograd.grad(y, (x, residual), torch.ones_like(y))
        assert gx.dtype == dtype and gr.dtype == wide


@suite("masked_softmax", "values")
def _masked_softmax(run: Implementation, dtype: torch.dtype, device: str) -> None:
    scores = noise(2, 3, 7, 7, seed=1, dtype=dtype, device=device) * 3
    mask = noise(2, 1, 7, 7, seed=2) > 0.3
    mask[..., 0] = False
    blind = mask.clone()
    blind[1, :, 3] = True
    cases: list[tuple[Tensor | None, bool]] = [
        (None, False),
        (None, True),
        (mask, False),
        (blind, False),
        (blind[:1], True),
    ]
    for hidden, causal in cases:
        local = None if hidden is None else hidden.to(device)
        check(
            lambda s, m=local, c=causal: run(s, m, 0.7, c), lambda s, m=hidden, c=causal: ref.masked_softmax(s, m, 0.7, c),
            (scores,), dtype, 2,
        )  # fmt: skip
    rectangular = noise(1, 2, 3, 9, seed=4, dtype=dtype, device=device)
    check(
        lambda s: run(s, None, 1.0, True),
        lambda s: ref.masked_softmax(s, None, 1.0, True),
        (rectangular,),
        dtype,
        2,
    )
    assert run(scores[:0], None, 1.0, True).shape == (0, 3, 7, 7)


def _angles(tokens: int, d: int, interleaved: bool, dtype: torch.dtype) -> Tensor:
    base = torch.outer(torch.arange(tokens).double(), 100.0 ** (-torch.arange(0, d, 2).double() / d))
    table = base.repeat_interleave(2, -1) if interleaved else torch.cat((base, base), -1)
    return table.to(torch.promote_types(dtype, torch.float32)).reshape(tokens, 1, 1, d)


@suite("rope", "values")
def _rope(run: Implementation, dtype: torch.dtype, device: str) -> None:
    for interleaved in (False, True):
        for heads, width, d in ((2, 16, 16), (3, 20, 10), (1, 8, 2), (12, 24, 24)):
            freqs = _angles(11, d, interleaved, dtype)
            t = noise(9, 2, heads, width, seed=1, dtype=dtype, device=device)
            check(
                lambda t, f=freqs, i=interleaved: run(t, f.to(device), i),
                lambda t, f=freqs, i=interleaved: ref.rope(t, f, i, None), (t,), dtype, 2,
            )  # fmt: skip


@suite("rope", "strides_packed_empty")
def _rope_packed(run: Implementation, dtype: torch.dtype, device: str) -> None:
    fused = noise(9, 2, 3, 48, seed=1, dtype=dtype, device=device)
    freqs = _angles(9, 16, False, dtype)
    check(
        lambda t: run(t, freqs.to(device)),
        lambda t: ref.rope(t, freqs, False, None),
        (fused[..., 16:32],),
        dtype,
        2,
    )
    cu = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    positions = torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 3])
    packed = noise(9, 3, 16, seed=2, dtype=dtype, device=device)
    check(
        lambda t: run(t, freqs.to(device), False, cu.to(device)), lambda t: ref.rope(t, freqs, False, positions),
        (packed,), dtype, 2,
    )  # fmt: skip
    assert run(fused[:0, ..., :16], freqs.to(device)).shape == (0, 2, 3, 16)


@suite("vocab_cross_entropy", "values")
def _cross_entropy(run: Implementation, dtype: torch.dtype, device: str) -> None:
    for smoothing in (0.0, 0.1):
        for vocab in (7, 130):
            logits = noise(5, 3, vocab, seed=1, dtype=dtype, device=device) * 4
            target = torch.randint(vocab, (5, 3), generator=torch.Generator().manual_seed(2))
            for inplace in (False, True):
                check(
                    lambda z, s=smoothing, t=target, i=inplace: run(z * 1, t.to(device), None, s, i),
                    lambda z, s=smoothing, t=target: ref.cross_entropy(z, t, s), (logits,), dtype, 2,
                )  # fmt: skip
    assert run(logits[:0], target[:0].to(device)).shape == (0, 3)


@suite("vocab_cross_entropy", "extreme_logits")
def _cross_entropy_extreme(run: Implementation, dtype: torch.dtype, device: str) -> None:
    """Large offsets and improbable targets must neither overflow nor lose the loss."""
    logits = noise(4, 50, seed=1, dtype=dtype, device=device) * 3 + 500
    logits[0, 7] = 100.0
    target = torch.tensor([7, 3, 4, 5])
    want = ref.cross_entropy(logits.double().cpu(), target, 0.0)
    loss = run(logits, target.to(device))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(loss, want, torch.float32 if dtype != torch.float64 else dtype, 20)


@suite("linear_cross_entropy", "values")
def _linear_cross_entropy(run: Implementation, dtype: torch.dtype, device: str) -> None:
    for smoothing, chunk in ((0.0, 4), (0.2, 64)):
        hidden = noise(10, 16, seed=1, dtype=dtype, device=device)
        weight = noise(37, 16, seed=2, dtype=dtype, device=device) * 0.5
        target = torch.randint(37, (10,), generator=torch.Generator().manual_seed(3))
        check(
            lambda h, w, t=target, s=smoothing, c=chunk: run(h, w, t.to(device), None, s, c),
            lambda h, w, t=target, s=smoothing: ref.cross_entropy(h @ w.t(), t, s), (hidden, weight), dtype, 2,
        )  # fmt: skip


@suite("linear_wgrad_accumulate", "values")
def _wgrad(run: Implementation, dtype: torch.dtype, device: str) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    for tokens in (13, 0):
        x, g = (
            noise(tokens, 24, seed=1, dtype=dtype, device=device),
            noise(tokens, 40, seed=2, dtype=dtype, device=device),
        )
        for buffer_dtype in {dtype, wide}:
            buffer = noise(40, 24, seed=3, dtype=buffer_dtype, device=device)
            want = buffer.double().cpu() + g.double().cpu().t() @ x.double().cpu()
            run(x, g, buffer)
            close(buffer, want, dtype)


@suite("embedding_grad", "values")
def _embedding_grad(run: Implementation, dtype: torch.dtype, device: str) -> None:
    ids = torch.tensor([3, 1, 3, 3, 0, 8, -1, 1, 12, 9])
    grad = noise(10, 19, seed=1, dtype=dtype, device=device)
    table = noise(10, 19, seed=2, dtype=torch.promote_types(dtype, torch.float32), device=device)
    want = table.cpu().double().clone()
    for row, i in enumerate(ids.tolist()):
        if 0 <= i < 10:
            want[i] += grad[row].double().cpu()
    run(ids.to(device), grad, table)
    close(table, want, torch.float32 if dtype != torch.float64 else dtype)


def _lists(dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    return [
        noise(*s, seed=seed + i, dtype=dtype, device=device)
        for i, s in enumerate(((5, 7), (1,), (0,), (2050,)))
    ]


def _scanned(
    dtype: torch.dtype, device: str, batch: int, length: int, heads: int, width: int, groups: int, state: int
) -> list[Tensor]:
    """x, dt, A, B, C and a first state; dt and states are wide as in a model."""
    wide = torch.promote_types(dtype, torch.float32)
    return [
        noise(batch, length, heads, width, seed=1, dtype=dtype, device=device),
        noise(batch, length, heads, seed=2, dtype=wide, device=device).exp() * 0.1,
        -noise(heads, seed=3, dtype=wide, device=device).exp(),
        noise(batch, length, groups, state, seed=4, dtype=dtype, device=device),
        noise(batch, length, groups, state, seed=5, dtype=dtype, device=device),
        noise(batch, heads, width, state, seed=6, dtype=wide, device=device),
    ]


@suite("state_space_scan", "values")
def _state_space_scan(run: Implementation, dtype: torch.dtype, device: str) -> None:
    """Errors in shares of the plain tolerance: 0.02 to 0.3; of A, whose gradient is a sum that cancels, up to 2.8.

    With bf16 operands 0.1 to 0.3; the interpreter, which cuts them off instead of rounding them: 0.6.
    """
    for *sizes, chunk in ((2, 1, 2, 8, 1, 4, 128), (2, 23, 6, 5, 3, 7, 12), (1, 130, 2, 33, 2, 17, 128)):
        inputs = _scanned(dtype, device, *sizes)
        check(lambda *i, c=chunk: run(*i[:5], c, i[5]), ref.state_space_scan, inputs, dtype, slack=4)


@suite("state_space_scan", "strides_and_no_state")
def _state_space_scan_strides(run: Implementation, dtype: torch.dtype, device: str) -> None:
    """x, B and C are slices of one tensor, wider than the operands; nothing comes before the first position."""
    wide = torch.promote_types(dtype, torch.float32)
    mixed = noise(1, 19, 4 * 6 + 2 * 2 * 5, seed=1, dtype=dtype, device=device).to(wide)
    x, B, C = mixed.split((24, 10, 10), dim=-1)
    x, B, C = x.unflatten(-1, (4, 6)), B.unflatten(-1, (2, 5)), C.unflatten(-1, (2, 5))
    _, dt, A, *_ = _scanned(dtype, device, 1, 19, 4, 6, 2, 5)
    check(
        lambda *inputs: run(*inputs, 10, operands=dtype),
        lambda x, dt, A, B, C: ref.state_space_scan(x, dt, A, B, C, torch.zeros(1, 4, 6, 5, dtype=torch.float64)),
        (x, dt.transpose(0, 1).contiguous().transpose(0, 1), A, B, C), dtype, slack=4,
    )  # fmt: skip
    for samples, positions in ((0, 19), (1, 0)):
        shared = (B[:samples, :positions], C[:samples, :positions])
        y, last = run(x[:samples, :positions], dt[:samples, :positions], A, *shared, 8)
        assert y.shape == (samples, positions, 4, 6) and last.shape == (samples, 4, 6, 5)
        assert y.dtype == last.dtype == wide and not last.any()


@suite("state_space_scan", "strong_decay")
def _state_space_scan_decay(run: Implementation, dtype: torch.dtype, device: str) -> None:
    """exp(dt A) is 1e-9 and less: outputs and gradients are those of every position alone, without NaN or infinity."""
    x, dt, A, B, C, first = _scanned(dtype, device, 1, 37, 4, 8, 2, 8)
    dt, A = dt.clamp_min(0.05) * 500, A.clamp_max(-1.0)
    first = first * 0
    inputs = [t.requires_grad_() for t in (x, dt, A, B, C, first)]
    y, last = run(*inputs[:5], 16, first)
    upstream = noise(*y.shape, seed=7, dtype=torch.float32, device=device).to(y.dtype)
    grads = torch.autograd.grad((y * upstream).sum() + last.sum(), inputs)
    wide = [t.detach().double().cpu() for t in (x, dt, B, C, upstream)]
    score = (wide[2] * wide[3]).sum(-1).repeat_interleave(2, dim=2)
    close(y, (score * wide[1]).unsqueeze(-1) * wide[0], dtype)
    along = score * (wide[0] * wide[4]).sum(-1)
    close(grads[1][:, :-1], along[:, :-1], dtype)  # the last position also gives the last state
    assert all(g.isfinite().all() for g in grads)


@suite("l2_norm", "values")
def _l2_norm(run: Implementation, dtype: torch.dtype, device: str) -> None:
    tensors = _lists(dtype, device, 1)
    want = torch.cat([t.double().cpu().flatten() for t in tensors]).norm()
    close(run(tensors), want, torch.float32)
    assert run([]).item() == 0.0


@suite("scale", "values")
def _scale(run: Implementation, dtype: torch.dtype, device: str) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    sources, targets = _lists(dtype, device, 1), _lists(wide, device, 9)
    assert run(sources, targets, 0.25).item() == 0.0
    for s, t in zip(sources, targets):
        close(t, s.double() * 0.25, torch.float32)
    assert run(sources, sources, torch.tensor(2.0, device=device)).item() == 0.0
    for s, t in zip(sources, targets):
        close(s, t.double() * 8, dtype)
    sources[3][1000] = float("inf")
    assert run(sources, targets, 1.0).item() == 1.0
    sources[3][1000] = float("nan")
    assert run(sources, targets, 1.0).item() == 1.0


@suite("adam", "values")
def _adam(run: Implementation, dtype: torch.dtype, device: str) -> None:
    """Three steps against the update written out in float64."""
    if dtype not in (torch.float32, torch.float64):
        return  # parameters of an optimizer are wide
    for decoupled, corrected in ((True, True), (False, True), (True, False)):
        params, first, second = (_lists(dtype, device, s) for s in (1, 20, 30))
        first, second = [t * 0 for t in first], [t * 0 for t in second]
        want = [
            (p.cpu().double().clone(), f.cpu().double().clone(), s.cpu().double().clone())
            for p, f, s in zip(params, first, second)
        ]
        for step in (1, 2, 3):
            grads = _lists(dtype, device, 100 * step)
            run(
                params, grads, first, second, step=step, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                decoupled=decoupled, bias_correction=corrected,
            )  # fmt: skip
            for i, g in enumerate(grads):
                p, m, v = want[i]
                g = g.double().cpu()
                p = p * (1 - 1e-3) if decoupled else p
                g = g if decoupled else g + 0.1 * p
                m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
                m_hat, v_hat = (m / (1 - 0.9**step), v / (1 - 0.95**step)) if corrected else (m, v)
                want[i] = (p - 1e-2 * m_hat / (v_hat.sqrt() + 1e-8), m, v)
        for p, m, v, (wp, wm, wv) in zip(params, first, second, want):
            close(p, wp, dtype, 4)
            close(m, wm, dtype, 4)
            close(v, wv, dtype, 4)


@suite("sgd", "values")
def _sgd(run: Implementation, dtype: torch.dtype, device: str) -> None:
    if dtype not in (torch.float32, torch.float64):
        return  # parameters of an optimizer are wide
    for momentum in (0.0, 0.9):
        params, momenta = _lists(dtype, device, 1), [t * 0 for t in _lists(dtype, device, 1)]
        reference = [p.cpu().double().clone().requires_grad_() for p in params]
        official = torch.optim.SGD(reference, lr=0.1, momentum=momentum, weight_decay=0.01)
        for step in range(3):
            grads = _lists(dtype, device, 50 * (step + 1))
            run(params, grads, momenta, lr=0.1, momentum=momentum, weight_decay=0.01, first_step=step == 0)
            for r, g in zip(reference, grads):
                r.grad = g.double().cpu()
            official.step()
        for p, r in zip(params, reference):
            close(p, r, dtype, 2)


def attention_case(
    run: Implementation, case: AttentionCase, dtype: torch.dtype, device: str, blind: str = "mean"
) -> None:
    """One attention case: values and gradients of q, k and v."""
    q = noise(case.sq, case.batch, case.heads, case.width, seed=1, dtype=dtype, device=device)
    k, v = (
        noise(case.sk, case.batch, case.groups, case.width, seed=s, dtype=dtype, device=device)
        for s in (2, 3)
    )
    packed = None
    if case.documents:
        edges = torch.tensor((0, *case.documents)).cumsum(0).int().to(device)
        packed = PackedSeqParams("thd", edges, edges, max(case.documents), max(case.documents))
    mask = case.mask()
    options: dict[str, Any] = {
        "causal": case.causal,
        "scale": case.width**-0.5,
        "packed": packed,
        "window": case.window,
    }
    check(
        lambda q, k, v: run(q, k, v, None if mask is None else mask.to(device), **options),
        lambda q, k, v: ref.attention(q, k, v, case.width**-0.5, case.hidden(), blind),
        (q, k, v), dtype, 2,
    )  # fmt: skip


def attention_dropout(run: Implementation, dtype: torch.dtype, device: str) -> None:
    """With v the identity the output shows the dropped probabilities; the gradients must use the same mask."""
    s, prob = 64, 0.25
    q, k = (noise(s, 1, 2, s, seed=i, dtype=dtype, device=device) * 0.3 for i in (1, 2))
    v = torch.eye(s, dtype=dtype, device=device).view(s, 1, 1, s).expand(s, 1, 2, s).contiguous()
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    torch.manual_seed(11)
    out = run(q, k, v, causal=True, scale=0.125, dropout_p=prob)
    shown = out.detach().view(s, 2, s).double().cpu()
    qw, kw, vw = (t.detach().double().cpu().requires_grad_() for t in (q, k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", qw, kw) * 0.125
    probs = ref.masked_softmax(scores, None, 1.0, True)
    kept = shown.permute(1, 0, 2).unsqueeze(0) > 0.5 * probs.detach()
    possible = torch.ones(s, s).tril().bool().expand_as(kept)
    share = 1 - kept[possible].double().mean().item()
    assert abs(share - prob) < 4 * (prob * (1 - prob) / possible.sum().item()) ** 0.5, f"dropped {share}"
    want = torch.einsum("bhij,jbhd->ibhd", probs * kept / (1 - prob), vw).reshape(s, 1, -1)
    slack = 1e6 if dtype == torch.float64 else 30  # the applied probability is a multiple of 2^-16
    close(out, want, dtype, slack)
    grad = noise(s, 1, 2 * s, seed=4, dtype=dtype, device=device)
    got = torch.autograd.grad(out, (q, k, v), grad)
    reference = torch.autograd.grad(want, (qw, kw, vw), grad.double().cpu())
    for g, w, name in zip(got, reference, "qkv"):
        close(g, w, dtype, slack, f"gradient of {name}")
    torch.manual_seed(11)
    assert torch.equal(run(q, k, v, causal=True, scale=0.125, dropout_p=prob), out)


__all__ = ["ATTENTION_CASES", "SUITES", "attention_case", "attention_dropout"]


@suite("fp8_quantize", "representable_values")
def _fp8_quantize(run: Implementation, dtype: torch.dtype, device: str) -> None:
    """Values that fp8 holds exactly come through unchanged, transposed alike; larger ones saturate; the amax is noted."""
    for fmt, top in ((torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)):
        x = (
            torch.tensor([0.0, 0.25, -1.5, 3.0, 6.0, -7.0, 1e5], device=device)
            .repeat(19)
            .view(7, 19)
            .to(dtype)
        )
        amax = torch.full((1,), 2.0, device=device)
        rows, columns = run(x, torch.full((), 2.0, device=device), fmt, amax, True)
        assert torch.equal(rows.float(), (2 * x.float()).clamp(-top, top).to(fmt).float())
        assert rows.dtype == fmt and columns.is_contiguous()
        assert torch.equal(columns.float(), rows.float().t())
        assert amax.item() == x.float().abs().max().item()
        assert run(x, amax, fmt)[1] is None
    assert run(x[:0], amax, fmt, amax, True)[1].shape == (19, 0)


@suite("fp8_gemm", "values")
def _fp8_gemm(run: Implementation, dtype: torch.dtype, device: str) -> None:
    out = torch.bfloat16 if dtype in (torch.bfloat16, torch.float16) else torch.float32
    for fmt in (torch.float8_e4m3fn, torch.float8_e5m2):
        for m, n, k in ((16, 32, 48), (64, 16, 128)):
            a = noise(m, k, seed=1, dtype=torch.float32, device=device).to(fmt)
            b = noise(n, k, seed=2, dtype=torch.float32, device=device).to(torch.float8_e4m3fn)
            scales = torch.tensor([0.5, 0.25], device=device).unbind()
            want = (a.double() @ b.double().t() * 0.125).cpu()
            for fast in (False, True):
                got = run(a, b, *scales, out, fast)
                assert got.dtype == out
                # narrow sums of the matrix units keep about 14 bits
                bound = {torch.float32: 1e-3, torch.bfloat16: 8e-3}[out] * (
                    a.double().abs() @ b.double().abs().t() / 8
                ).cpu()
                assert ((got.double().cpu() - want).abs() <= bound + 1e-6).all()
