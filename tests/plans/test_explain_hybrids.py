"""What tools/explain.py says of hybrid models: closed formulas, hand-counted transfers, and the refusals of real runs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from megatron.core.errors import FlagError, InvariantError
from megatron.training import arguments
from megatron.training.config import rules
from megatron.training.explain import explain, inventory, parameters
from megatron.training.flops import num_floating_point_operations
from tests.plans.test_explain import ROOT, of, text_of, traffic
from tests.runs.pretraining import amended

STACK = "--spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec "
COMMON = (
    "--train-iters 10 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --make-vocab-size-divisible-by 128 "
    "--micro-batch-size 1 --attention-dropout 0 --hidden-dropout 0 --position-embedding-type none "
)
#: As published (examples/mamba): a pattern of 24 Mamba, 4 attention and 28 MLP layers.
PUBLISHED = (
    "--num-layers 56 --hidden-size 4096 --num-attention-heads 32 --group-query-attention --num-query-groups 8 "
    "--hybrid-attention-ratio 0.08 --hybrid-mlp-ratio 0.5 --seq-length 4096 --max-position-embeddings 4096 "
    "--untie-embeddings-and-output-weights --normalization RMSNorm --disable-bias-linear --vocab-size 255999 --bf16 "
)
WIDTH, LENGTH, VOCABULARY = 256, 256, 1024
SMALL = (
    f"--num-layers 4 --hidden-size {WIDTH} --num-attention-heads 4 --seq-length {LENGTH} --vocab-size {VOCABULARY - 1} "
    f"--max-position-embeddings {LENGTH} --hybrid-override-pattern M*-M --global-batch-size 8 "
)


def line(words: str, spec: str = STACK) -> str:
    return f"pretrain_mamba.py {spec}{COMMON}{words} "


def mamba_numel(h: int, tp: int = 1, *, norm: int) -> int:
    """Parameters of a Mamba layer on one of `tp` ranks: two inner channels per channel, heads of 64, 8 groups of 128."""
    inner, shared = 2 * h // tp, 8 * 128 // tp
    heads = inner // 64
    convolved = inner + 2 * shared
    projections = h * (inner + convolved + heads) + inner * h
    return projections + 5 * convolved + 3 * heads + inner + norm


def attention_numel(h: int, kv: int, tp: int = 1, *, norm: int) -> int:
    return (2 * h * h + 2 * h * kv) // tp + norm


def mlp_numel(h: int, tp: int = 1, *, norm: int) -> int:
    return 8 * h * h // tp + norm


# Parameters --------------------------------------------------------------------------------------------------------


def test_published_model() -> None:
    """RMS norms without biases; keys and values of 8 heads of 128; two tables of 256,000 words."""
    h, norm = 4096, 4096
    layers = 24 * mamba_numel(h, norm=norm) + 4 * attention_numel(h, 1024, norm=norm)
    expected = layers + 28 * mlp_numel(h, norm=norm) + 2 * 256_000 * h + norm
    found = of(line(PUBLISHED) + "--global-batch-size 8 --world-size 1")
    assert parameters.total(found.stages, found.args) == expected == 8_654_517_248


@pytest.mark.parametrize("tp", [2, 8])
def test_published_model_on_the_ranks_of_a_pipeline(tp: int) -> None:
    """Norms of the residual stream are on every rank, the rest is divided; stages hold what the pattern gives them."""
    more = f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size 4 --sequence-parallel "
    found = of(line(PUBLISHED) + more + f"--global-batch-size 64 --world-size {tp * 32}")
    patterns = [row[0].kinds for row in found.stages]
    assert [len(pattern) for pattern in patterns] == [14] * 4
    assert [sum(pattern.count(kind) for pattern in patterns) for kind in "M*-"] == [24, 4, 28]
    h = 4096
    sizes = {
        "M": mamba_numel(h, tp, norm=h),
        "*": attention_numel(h, 1024, tp, norm=h),
        "-": mlp_numel(h, tp, norm=h),
    }
    ends = [256_000 * h // tp, 0, 0, 256_000 * h // tp + h]
    for row, pattern, end in zip(found.stages, patterns, ends):
        assert row[0].numel == sum(sizes[kind] for kind in pattern) + end
    assert parameters.total(found.stages, found.args) == 8_654_517_248


# Work and memory ---------------------------------------------------------------------------------------------------


def test_halves_of_layers_have_the_flops_of_the_formula() -> None:
    """Attention and MLP layers in turn: what the throughput log counts."""
    words = (
        SMALL.replace("M*-M", "*-*-") + "--group-query-attention --num-query-groups 2 --swiglu --device cpu"
    )
    found = of(line(words))
    [[chunk]] = found.works
    forward = sum(work.flops * count for work, count in chunk.all())
    causal = sum(work.attention * count for work, count in chunk.all())
    full = 2 * 4 * LENGTH * LENGTH * WIDTH  # two layers' scores and context
    step = 3 * (forward - causal + full) * found.workload.microbatches
    assert step == pytest.approx(num_floating_point_operations(found.args, 8), rel=1e-12)


def test_flops_of_a_scan() -> None:
    """In two chunks of 128 positions: C B^T and its use per head, the states that a chunk adds, and what they give it."""
    [[chunk]] = of(line(SMALL)).works
    [scan] = {work for work, _ in chunk.all() if work.name == "scan"}
    heads, width, groups, state, chunks, size = 8, 64, 8, 128, 2, 128
    scores = groups * size * size * state
    within = heads * size * size * width
    between = 2 * heads * size * width * state
    assert scan.flops == 2 * chunks * (scores + within + between)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_mamba_layer_keeps_what_its_projections_read_and_give(tp: int) -> None:
    """In bf16: input of the norm with two statistics, of both projections, and the first one's output; no scan."""
    more = f"--bf16 --device h100 --tensor-model-parallel-size {tp} --world-size {tp} "
    found = of(line(SMALL) + more + ("--sequence-parallel" if tp > 1 else ""))
    [[chunk]] = found.works
    layer = next(group.works for group in chunk.groups if any(work.name == "scan" for work in group.works))
    held = sum(work.kept for work in layer if not work.runs_again(found.workload))
    inner, shared, heads = 2 * WIDTH // tp, 8 * 128 // tp, 8 // tp
    stream = 2 * (2 * WIDTH) + 8
    assert held == LENGTH * (stream / tp + 2 * (2 * inner + 2 * shared + heads) + 2 * inner)


def test_scans_of_one_layer_at_a_time_come_to_life() -> None:
    """More Mamba layers add what they keep, not what their scans do."""
    few, many = (
        of(line(SMALL.replace("M*-M", "M" * count).replace("layers 4", f"layers {count}")))
        for count in (2, 6)
    )
    assert few.works[0][0].groups[0].works == many.works[0][0].groups[0].works
    [[chunk]] = few.works
    each = inventory.kept_bytes(few.workload, chunk) - sum(work.kept for work in (*chunk.front, *chunk.back))
    assert many.memory[0].activations - few.memory[0].activations == pytest.approx(2 * each)


def test_fused_scans_move_less() -> None:
    """On a GPU in bf16; what is recomputed is also smaller by the [l, l] matrices of a chunk, which dominate it."""
    layers = [of(line(PUBLISHED) + f"--bf16 --device {name}").works[0][0].all() for name in ("cpu", "h100")]
    plain, fused = ({work for work, _ in layer if work.name == "scan"}.pop() for layer in layers)
    assert 1.5 < plain.moved / fused.moved < 1.8 and 1.4 < plain.moved_back / fused.moved_back < 1.7
    assert fused.operand_bytes == 2 and plain.operand_bytes == 4
    pairs = 2 * 4096 * 128 * 128 * 4  # decays and weights between positions of a chunk
    assert plain.kept - fused.kept > pairs


def test_single_precision_products_take_longer_on_a_gpu() -> None:
    """The matrix units of an H100 do fifteen times as many half-precision products as its fp32 units."""
    wide, narrow = (of(line(PUBLISHED.replace("--bf16", flag)) + "--device h100") for flag in ("", "--bf16"))
    assert wide.step.seconds > 3 * narrow.step.seconds


# Traffic -----------------------------------------------------------------------------------------------------------


def test_tensor_parallel_bytes() -> None:
    """A layer of any kind sums [s, b, h] once forward and once backward; so do the embedding and the logits' input."""
    sent = traffic(line(SMALL) + "--tensor-model-parallel-size 2 --world-size 2")
    tensor = LENGTH * WIDTH * 4
    assert sent == {("tensor", "activations, gradients"): 8 * (4 * 2 + 1 + 1) * 2 * (1 / 2) * tensor}


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", rules.HYBRID, ids=lambda rule: rule.bad)
def test_refuses_what_the_run_refuses(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = amended(f"{STACK}{COMMON}{SMALL.replace('--global-batch-size 8', '')}".split(), rule.bad)
    monkeypatch.setenv("WORLD_SIZE", "12")
    args = arguments.validate_args(arguments.parse_args(argv=words))
    with pytest.raises(FlagError) as real:
        rules.check(args, rules.HYBRID)
    with pytest.raises(FlagError) as planned:
        explain(["pretrain_mamba.py", *words, "--device", "cpu"])
    assert str(planned.value) == str(real.value)


@pytest.mark.parametrize(
    ("more", "subject"),
    [
        ("--hybrid-override-pattern M*X-", "--hybrid-override-pattern"),
        ("--hybrid-override-pattern M*-", "--hybrid-override-pattern, --num-layers"),
        ("--hybrid-attention-ratio 0.75", "--hybrid-override-pattern, --hybrid-attention-ratio"),
        ("--hidden-size 320 --num-attention-heads 5", "--hidden-size"),
        ("--tensor-model-parallel-size 16 --num-attention-heads 16 --world-size 16", "--tensor-model-parallel-size"),
    ],
)  # fmt: skip
def test_impossible_sizes_are_named(more: str, subject: str) -> None:
    with pytest.raises(InvariantError) as error:
        of(line(SMALL) + more)
    assert str(error.value).startswith(subject)


def test_layers_without_known_work_are_named() -> None:
    with pytest.raises(FlagError, match="--spec: what its layers compute is not known"):
        of(line(SMALL, spec="--spec tests.unit.ssm.support foreign_stack_spec "))


def test_other_models_refuse_hybrid_flags() -> None:
    with pytest.raises(FlagError, match=r"train with pretrain_mamba\.py"):
        of(COMMON + SMALL)


def test_formula_of_transformers_is_not_applied() -> None:
    done = subprocess.run(
        [sys.executable, "tools/report_theoretical_memory.py", *line(SMALL).split()],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    assert (
        "pretrain_mamba.py: the formula is a transformer's" in done.stderr
        and "tools/explain.py" in done.stderr
    )


# The report --------------------------------------------------------------------------------------------------------


def test_report_on_1024_ranks() -> None:
    layout = "--tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4 "
    text = text_of(
        line(PUBLISHED) + layout + "--use-distributed-optimizer --global-batch-size 1024 --world-size 1024"
    )
    for part in (
        "> layout: 1024 rank(s) on H100 = tensor 8 x context 1 x pipeline 4 x data 32",
        "> model: 8,654,517,248 parameters",
        ">   layers: 24 Mamba, 4 attention, 28 MLP",
        ">   on each rank of stage 3: 336,043,808, M-M*-M--M-M-M-",
        "> model FLOPs per step: 1.964e+17",
        ">   state_space_scan (bfloat16): triton",
        ">   scans of Mamba layers: 39% of the work of a micro-batch (Triton kernels, between them plain PyTorch",
    ):
        assert part in text, part
    assert "transformer_engine" not in text and "Transformer Engine" not in text
    text = text_of(line(SMALL))
    assert ">   state_space_scan (float32): torch" in text and "(plain PyTorch; counted" in text
    assert "scans" not in text_of(line(SMALL.replace("M*-M", "*-*-")))
