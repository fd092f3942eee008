"""Between two log lines the host never asks an accelerator for a number.

The whole step runs on torch's meta device, which has no numbers to give: `.item()`, `bool()` or a copy to the host raise.
Kernels are chosen as on an H200 whose optional packages are not installed.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from megatron.core import device, parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.kernels import capability
from megatron.training import arguments, setup
from megatron.training.global_vars import get_context, set_global_variables
from megatron.training.log import training_log
from megatron.training.step import train_step
from tests.gang.harness import run_gang

H200 = capability.Capabilities((9, 0), "NVIDIA H200", torch.__version__, {})
COMMON = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 9 --log-interval 5 --mock-data --num-workers 0 "
    "--tokenizer-type NullTokenizer --vocab-size 100 --transformer-impl local --distributed-backend gloo "
    "--metrics-file /dev/null "
)
CASES = {
    "bf16": "--bf16 --clip-grad 1.0",
    "bf16 with the distributed optimizer": "--bf16 --use-distributed-optimizer --overlap-grad-reduce",
    "fp32 without dropout": "--attention-dropout 0 --hidden-dropout 0",
    "rotary, grouped, gated": "--bf16 --position-embedding-type rope --swiglu --normalization RMSNorm "
    "--group-query-attention --num-query-groups 1 --cross-entropy-loss-fusion",
    "fp8, delayed": "--bf16 --fp8-format hybrid",
    "fp8, tensorwise": "--bf16 --fp8-format e4m3 --fp8-recipe tensorwise --no-fp8-wgrad",
    "selective recomputation": "--bf16 --recompute-granularity selective",
}


def steps(flags: str, count: int) -> list[int]:
    """Body: train and account for steps on a device without numbers; returns the iterations done."""
    import pretrain_gpt

    args = arguments.parse_args(argv=(COMMON + flags).split())
    arguments.validate_args(args, {})
    arguments.validate_for_training(args)
    set_global_variables(args)
    parallel_state.initialize_model_parallel()
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    done, totals = [], {}
    autocast = mock.patch.object(
        torch, "is_autocast_enabled", return_value=False
    )  # it does not know meta devices
    with device.planning("cuda"), capability.pretend(H200), autocast:
        model, optimizer, scheduler = setup.setup_model_and_optimizer(
            pretrain_gpt.model_provider, ModelType.encoder_or_decoder, ctx=get_context()
        )
        config = model[0].config
        config.grad_scale_func = optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = model[0].no_sync if args.overlap_grad_reduce else None
        config.timers = get_context().timers
        words = torch.zeros(2, 16, dtype=torch.int64, device="meta")
        batch: dict[str, Any] = {
            "tokens": words, "labels": words, "position_ids": words, "loss_mask": torch.ones(2, 16, device="meta")
        }  # fmt: skip
        for chunk in model:
            chunk.train()
        for iteration in range(1, count + 1):
            args.curr_iteration = iteration - 1
            losses, skipped, norm, zeros = train_step(
                pretrain_gpt.forward_step,
                iter([batch] * 9),
                model,
                optimizer,
                scheduler,
                config,
                ctx=get_context(),
            )
            training_log(
                losses, totals, 1e-3, None, iteration, optimizer.get_loss_scale(), False, skipped, norm, None, zeros,
                ctx=get_context(),
            )  # fmt: skip
            device.raise_awaited()
            done.append(iteration)
        with pytest.raises(RuntimeError, match=r"meta tensors|Tensor.item"):
            next(iter(losses.values())).item()  # the device does refuse
    return done


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_a_step_waits_for_nothing(flags: str) -> None:
    assert run_gang(1, steps, flags, 3) == [[1, 2, 3]]
