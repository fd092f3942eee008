"""Any combination of options either trains, or is refused by every rank in one line: no traceback, no rank left waiting."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron.core.errors import MegatronError
from tests.gang.harness import run_gang
from tests.runs.drawing import always_the_same, check_part
from tests.runs.pretraining import run_script

RUN = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3 --mock-data --num-workers 0 "
    "--tokenizer-type NullTokenizer --vocab-size 100 --eval-iters 1 --eval-interval 1 --log-interval 1 "
    "--transformer-impl local --distributed-backend gloo --distributed-timeout-minutes 1 --metrics-file /dev/null "
)
LAYOUTS = (
    "", "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel",
    "--pipeline-model-parallel-size 2", "--context-parallel-size 2", "--use-distributed-optimizer",
)  # fmt: skip
#: FOLDER stands for a fresh directory.
OPTIONS = (
    # the model
    "--position-embedding-type rope", "--position-embedding-type none", "--rotary-percent 0.5", "--rotary-interleaved",
    "--normalization RMSNorm", "--apply-layernorm-1p", "--qk-layernorm", "--kv-channels 8", "--hidden-size 48",
    "--group-query-attention --num-query-groups 2", "--untie-embeddings-and-output-weights", "--disable-bias-linear",
    "--fp32-residual-connection", "--apply-query-key-layer-scaling", "--attention-softmax-in-fp32", "--swiglu",
    "--squared-relu", "--openai-gelu", "--use-flash-attn", "--cross-entropy-loss-fusion", "--num-layers 3",
    "--num-experts 4", "--num-experts 2 --moe-router-topk 1", "--num-experts 2 --expert-model-parallel-size 2",
    "--moe-router-load-balancing-type sinkhorn --moe-router-topk 1", "--moe-aux-loss-coeff 0.01", "--moe-grouped-gemm",
    "--moe-expert-capacity-factor 1.0", "--moe-pad-expert-input-to-capacity", "--moe-layer-recompute",
    "--moe-token-dispatcher-type alltoall", "--moe-per-layer-logging", "--moe-router-pre-softmax",
    # memory and overlap
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", "--recompute-activations",
    "--overlap-grad-reduce", "--overlap-param-gather", "--overlap-param-gather-with-optimizer-step",
    "--distribute-saved-activations", "--defer-embedding-wgrad-compute", "--num-layers-per-virtual-pipeline-stage 1",
    "--tp-comm-overlap", "--tp-comm-overlap --tp-comm-overlap-rs-dgrad --disable-tp-comm-bulk-dgrad", "--log-straggler",
    "--standalone-embedding-stage", "--encoder-pipeline-model-parallel-size 1", "--use-tp-pp-dp-mapping",
    # precision and optimizer
    "--bf16", "--fp16", "--fp8-format hybrid", "--optimizer sgd", "--clip-grad 0", "--decoupled-lr 1e-3",
    "--calculate-per-token-loss", "--accumulate-allreduce-grads-in-fp32", "--use-cpu-initialization",
    # the schedule
    "--rampup-batch-size 2 2 4", "--lr-warmup-iters 1", "--lr-warmup-samples 2", "--lr-warmup-fraction 0.5",
    "--lr-decay-style inverse-square-root", "--lr-decay-style WSD --lr-wsd-decay-iters 1", "--min-lr 1e-5",
    "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1", "--skip-train",
    "--exit-interval 1", "--exit-duration-in-mins 0", "--exit-signal-handler", "--eval-iters 0",
    # data
    "--dataloader-type cyclic", "--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss", "--seq-length 16",
    "--no-create-attention-mask-in-dataloader", "--micro-batch-size 1",
    # what is written
    "--tensorboard-dir FOLDER", "--log-timers-to-tensorboard", "--log-world-size-to-tensorboard", "--log-throughput",
    "--timing-log-level 2", "--timing-log-option all", "--log-num-zeros-in-grad", "--log-params-norm",
    "--config-logger-dir FOLDER", "--save FOLDER --save-interval 1", "--async-save", "--ckpt-format torch",
    "--non-persistent-save-interval 1", "--non-persistent-ckpt-type global", "--log-progress", "--profile",
    "--no-ckpt-fully-parallel-save", "--use-pytorch-profiler", "--profile-step-start 0 --profile-step-end 1",
    # checks
    "--sanity-checks", "--check-weight-hash-across-dp-replicas-interval 1", "--deterministic-mode",
    "--data-parallel-random-init", "--barrier-with-L1-time", "--no-barrier-with-level-1-timing", "--manual-gc",
)  # fmt: skip
COMBINATIONS = st.tuples(
    st.sampled_from((1, 2, 4)), st.sampled_from(LAYOUTS), st.sets(st.sampled_from(OPTIONS), max_size=6)
)


def attempt(argv: list[str]) -> str | None:
    """Body: None after a good end, else the line with which this rank refuses."""
    try:
        run_script(argv)
    except MegatronError as error:
        return str(error)
    except SystemExit as end:
        return f"status {end.code}"
    return None


def check(combination: Any) -> None:
    ranks, layout, options = combination
    with tempfile.TemporaryDirectory() as folder:
        words = f"{RUN} {layout} {' '.join(sorted(options))}".replace("FOLDER", folder).split()
        refusals = run_gang(ranks, attempt, words)
    assert refusals == [None] * ranks or all(refusals), (" ".join(words), refusals)


@example(
    (2, "", {"--num-experts 2 --expert-model-parallel-size 2", "--encoder-pipeline-model-parallel-size 1"})
)
@given(COMBINATIONS)
@always_the_same(10)
def test_some_combinations(combination: Any) -> None:
    check(combination)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_many_combinations(number: int) -> None:
    """500 more, in ten parts that can be repeated one by one."""
    check_part(check, COMBINATIONS, number, 50)
