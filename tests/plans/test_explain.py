"""What tools/explain.py says, against closed formulas, known models and hand-counted transfers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch.distributed as dist

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.errors import FlagError
from megatron.core.pipeline_parallel.plan import make_plan, peak_in_flight
from megatron.training.explain import (
    Explanation,
    describe,
    explain,
    inventory,
    layers,
    parameters,
    reconsider,
)
from megatron.training.explain.command import understand
from megatron.training.flops import num_floating_point_operations

ROOT = Path(__file__).parents[2]
GPT3 = (
    "--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048 "
    "--micro-batch-size 1 --global-batch-size 1536 --rampup-batch-size 16 16 5859375 --train-samples 768000000 "
    "--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5 "
    "--lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-samples 660480000 "
    "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --data-path corpus_text_document "
    "--vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt --split 949,50,1 --log-interval 100 --save-interval 10000 "
    "--eval-interval 1000 --eval-iters 10 --save checkpoints --load checkpoints --tensorboard-dir logs "
)
TINY = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 "
    "--micro-batch-size 2 --global-batch-size 16 --train-iters 10 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 1023 --transformer-impl local --attention-dropout 0 --hidden-dropout 0 "
)
LLAMA = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --make-vocab-size-divisible-by 1 --tokenizer-type Llama2Tokenizer "
    "--tokenizer-model absent.model --seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1 "
    "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --mock-data --train-iters 1 --lr 1e-4 "
)


def of(words: str) -> Explanation:
    return explain(words.split())


def text_of(words: str) -> str:
    return "\n".join(describe.lines(of(words)))


# The command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "script", "ranks"),
    [
        ("--num-layers 2", "pretrain_gpt", 1),
        ("pretrain_bert.py --num-layers 2", "pretrain_bert", 1),
        ("torchrun --nproc-per-node 8 /elsewhere/pretrain_mamba.py --num-layers 2", "pretrain_mamba", 8),
        ("pretrain-mamba --num-layers 2", "pretrain_mamba", 1),
        ("python3 ../pretrain_t5.py --num-layers 2 --world-size=16", "pretrain_t5", 16),
        ("torchrun --nproc-per-node 8 --nnodes 4 pretrain_gpt.py --num-layers 2", "pretrain_gpt", 32),
        ("torchrun --nproc_per_node=8 --nnodes=1:4 ./pretrain_gpt.py --num-layers 2", "pretrain_gpt", 32),
        ("python -m torch.distributed.run --nnodes 2 pretrain-gpt --num-layers 2", "pretrain_gpt", 2),
        ("torchrun --nnodes 2 pretrain_gpt.py --num-layers 2 --world-size 64", "pretrain_gpt", 64),
    ],
)
def test_launchers_and_scripts(words: str, script: str, ranks: int) -> None:
    command = understand(words.split(), {})
    assert (command.script, command.world_size, command.flags) == (script, ranks, ("--num-layers", "2"))


def test_world_size_of_the_environment() -> None:
    assert understand(["--num-layers", "2"], {"WORLD_SIZE": "48"}).world_size == 48


@pytest.mark.parametrize(
    ("words", "subject"),
    [
        ("--world-size many", "--world-size"),
        ("--world-size", "--world-size"),
        ("--device tpu", "--device"),
        ("--profile nowhere.json " + TINY, "--profile nowhere.json"),
        (TINY + "--tensor-model-parallel-size 3", "--tensor-model-parallel-size"),
        (TINY.replace("--vocab-size 1023", ""), "--vocab-size"),
        (TINY + "--encoder-pipeline-model-parallel-size 1 --world-size 2", "--encoder-pipeline-model"),
    ],
)
def test_mistakes_are_named(words: str, subject: str) -> None:
    with pytest.raises(FlagError, match=subject):
        of(words)


def test_flags_that_the_model_does_not_read_are_named() -> None:
    text = text_of("pretrain_gpt.py --decoder-seq-length 8 --mask-prob 0.3 " + TINY)
    assert "--decoder-seq-length has no effect on GPT" in text and "--mask-prob has no effect on GPT" in text


def test_profile_without_a_file_is_the_flag_of_training() -> None:
    words = ["--num-layers", "2", "--profile", "--profile-step-end", "20", "--profile"]
    command = understand(words)
    assert command.profile is None and list(command.flags) == words


# Parameters --------------------------------------------------------------------------------------------------------


def test_gpt2_small() -> None:
    """124,439,808 weights with 50,257 words, of which padding makes 50,304."""
    words = (
        "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --max-position-embeddings 1024 "
        "--micro-batch-size 1 --vocab-file absent --merge-file absent --mock-data --train-iters 1 --lr 1e-4"
    )
    found = of(words)
    assert parameters.total(found.stages, found.args) == 124_439_808 + (50_304 - 50_257) * 768


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("--ffn-hidden-size 11008", 6_738_415_616),  # Llama 2 7B
        ("--ffn-hidden-size 11008 --world-size 16 --tensor-model-parallel-size 4 "
         "--pipeline-model-parallel-size 2 --sequence-parallel", 6_738_415_616),
        ("--ffn-hidden-size 14336 --group-query-attention --num-query-groups 8 --num-experts 8 --world-size 32 "
         "--expert-model-parallel-size 8 --pipeline-model-parallel-size 4", 46_702_792_704),  # Mixtral 8x7B
    ],
)  # fmt: skip
def test_known_models(words: str, count: int) -> None:
    found = of(LLAMA + words)
    assert parameters.total(found.stages, found.args) == count


def test_gpt3_175b() -> None:
    """Each layer has 12 h^2 weights, 9 h biases and 4 h norm parameters; embeddings and the final norm come on top."""
    found = of(GPT3 + "--world-size 1024")
    h, layers, vocabulary = 12288, 96, 51200
    layer = 12 * h * h + 13 * h
    assert parameters.total(found.stages, found.args) == layers * layer + (vocabulary + 2048) * h + 2 * h
    divided = (12 * h * h + 7 * h) // 8 + 6 * h  # per layer on one of eight tensor-parallel ranks
    sizes = [sum(chunk.numel for chunk in row) for row in found.stages]
    assert sizes[1:15] == [6 * divided] * 14
    assert sizes[0] == 6 * divided + vocabulary * h // 8 + 2048 * h
    assert sizes[15] == 6 * divided + vocabulary * h // 8 + 2 * h


def test_chunks_of_an_interleaved_pipeline() -> None:
    found = of(
        TINY + "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --world-size 2"
    )
    assert [[(c.decoder_layers, c.embeds, c.scores) for c in row] for row in found.stages] == [
        [(1, True, False), (1, False, False)],
        [(1, False, False), (1, False, True)],
    ]


# Work and memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", ["", "--swiglu --ffn-hidden-size 192", "--group-query-attention --num-query-groups 2"]
)
def test_inventory_has_the_flops_of_the_formula(more: str) -> None:
    """Six FLOPs per weight and token and full attention, over a step: what the throughput log counts."""
    found = of(TINY + more + " --device cpu")
    forward = sum(work.flops * count for row in found.works for chunk in row for work, count in chunk.all())
    causal = sum(
        work.attention * count for row in found.works for chunk in row for work, count in chunk.all()
    )
    full = 4 * 2 * 128 * 128 * 64 * 4  # micro-batch x s^2 x h x layers, scores and context
    step = 3 * (forward - causal + full) * found.workload.microbatches
    assert step == pytest.approx(num_floating_point_operations(found.args, 16), rel=1e-12)


def test_activations_of_a_layer_are_the_published_ones() -> None:
    """34 s b h + 5 a s^2 b bytes in half precision with dropout and stored scores (arXiv:2205.05198, equation 1)."""
    words = TINY.replace("--attention-dropout 0 --hidden-dropout 0", "--fp16 --device a100")
    found = reconsider(of(words), attention="scores", softmax_in_fp32=False)
    works = layers.transformer_layer(found.workload, decoder=True)
    s, b, h, a = 128, 2, 64, 4
    statistics = 2 * 8 * s * b  # mean and deviation of two norms, which the equation leaves out
    assert sum(work.kept for work in works) == 34 * s * b * h + 5 * a * s * s * b + statistics


@pytest.mark.parametrize(
    ("precision", "each", "shared"), [("", 8, 8), ("--bf16", 6, 12), ("--fp16", 4, 16)]
)  # fmt: skip
@pytest.mark.parametrize("replicas", [1, 4])
def test_bytes_per_parameter(precision: str, each: int, shared: int, replicas: int) -> None:
    """Weights and gradients are on every rank, the rest is divided: 4 + 16/d, 6 + 12/d and 8 + 8/d bytes."""
    found = of(TINY + f"{precision} --use-distributed-optimizer --world-size {replicas}")
    stage = found.memory[0]
    held = stage.weights + stage.gradients + stage.optimizer
    numel = sum(chunk.numel for row in found.stages for chunk in row)
    assert held == pytest.approx(numel * (each + shared / replicas), rel=0.01)


def test_bytes_of_fp8_weights() -> None:
    """Kept in bf16 a weight of an fp8 layer takes two bytes and its two operands two more, kept in fp8 two in all."""
    words = TINY + "--bf16 --use-distributed-optimizer --world-size 4 --fp8-format hybrid "
    kept, plain = of(words + "--fp8-param-gather"), of(words)
    in_fp8 = sum(p.numel for row in kept.stages for chunk in row for p in chunk.parameters if p.fp8)
    assert in_fp8 > 0
    saved = plain.memory[0].weights - kept.memory[0].weights
    assert saved == pytest.approx(2 * in_fp8, rel=0.02)  # the filling of one more buffer
    sent = [sum(row.bytes for row in found.traffic(0) if row.what == "parameters") for found in (plain, kept)]
    assert sent[0] - sent[1] == in_fp8 * 3 / 4


def test_fp8_products_take_less_time() -> None:
    assert (
        of(GPT3 + "--world-size 1024 --fp8-format hybrid").step.seconds
        < of(GPT3 + "--world-size 1024").step.seconds
    )


def test_activations_in_flight_follow_the_plan() -> None:
    found = of(GPT3 + "--world-size 1024")
    one = inventory.kept_bytes(found.workload, found.works[5][0])
    for stage in range(1, 15):
        plan = make_plan(stage, 16, 1, 192)
        assert found.memory[stage].activations == one * peak_in_flight(plan) == one * (16 - stage)


def test_bubble_of_a_plain_pipeline() -> None:
    """A plain pipeline idles p - 1 of m + p - 1 turns (arXiv:2104.04473, section 2.1), were all stages equal."""
    found = of(GPT3 + "--world-size 1024")
    # The first and last stage do a little more than the others, which only the measured bubble includes.
    assert found.step.bubble == pytest.approx(15 / (192 + 15), rel=0.15)


# Traffic -----------------------------------------------------------------------------------------------------------


def traffic(words: str, stage: int = 0) -> dict[tuple[str, str], float]:
    return {(row.group, row.what): row.bytes for row in of(words).traffic(stage)}


def test_one_rank_sends_nothing() -> None:
    assert traffic(TINY) == {}


def test_data_parallel_bytes() -> None:
    """An all-reduce sends 2 (n-1)/n of the gradients; with the distributed optimizer one half is weights in their dtype."""
    numel = sum(chunk.numel for row in of(TINY).stages for chunk in row)
    assert traffic(TINY + "--world-size 4") == {("data", "gradients"): 2 * 3 / 4 * numel * 4}
    shared = traffic(TINY + "--world-size 4 --bf16 --use-distributed-optimizer")
    assert shared == {("data", "gradients"): 3 / 4 * numel * 4, ("data", "parameters"): 3 / 4 * numel * 2}


def test_tensor_parallel_bytes() -> None:
    """Per layer two all-reduces of [s, b, h] forward and two backward; one for the embedding, one for the logits' input."""
    sent = traffic(TINY + "--tensor-model-parallel-size 2 --world-size 2")["tensor", "activations, gradients"]
    tensor = 128 * 2 * 64 * 4
    reductions = 4 * 4 + 1 + 1
    assert sent == 8 * reductions * 2 * (1 / 2) * tensor


def test_pipeline_bytes() -> None:
    """Every micro-batch hands on one [s, b, h] forward and one backward at each border that a stage has."""
    words = TINY + "--pipeline-model-parallel-size 4 --world-size 4"
    tensor = 128 * 2 * 64 * 4
    sent = [traffic(words, stage) for stage in range(4)]
    handed = [found["pipeline", "activations, gradients"] for found in sent]
    assert handed == [8 * tensor, 2 * 8 * tensor, 2 * 8 * tensor, 8 * tensor]
    # Of 1,024 words, which the first and the last stage hold.
    assert [found.get(("pipeline", "gradients of tied words")) for found in sent] == [
        1024 * 64 * 4, None, None, 1024 * 64 * 4
    ]  # fmt: skip


# The report --------------------------------------------------------------------------------------------------------


def test_report_of_175b_on_1024_ranks() -> None:
    assert not dist.is_initialized()
    text = text_of(GPT3 + "--world-size 1024")
    assert not dist.is_initialized()
    for part in (
        "> layout: 1024 rank(s) on H100 = tensor 8 x context 1 x pipeline 16 x data 8",
        "assumed: vocabulary of 50257, usual for GPT2BPETokenizer (gpt2-vocab.json, gpt2-merges.txt not here)",
        "vocabulary 50257 padded to 51200",
        "> model: 174,615,846,912 parameters",
        "on each rank of stages 1-14: 1,359,461,376",
        "core_attention (float16)",
        "> learning rate: cosine, 0 -> 6e-05 over 660480 samples, then to 6e-06 at 660480000 samples",
        "> weight decay: 0.1",
        "corpus_text_document: weight 1, 768000000 samples (the file is not here: epochs unknown)",
        "stage 15: ",
        "GB tensor-parallel (activations, gradients), inside the node",
        "> model FLOPs per step: 3.386e+18",
        "> predicted step on h100",
    ):
        assert part in text, part


def test_combination_of_the_published_script_is_explained_and_named() -> None:
    """The published list of flags gives iterations beside a ramp-up, which no run accepts."""
    words = GPT3.replace("--train-samples 768000000", "--train-iters 500000")
    words = words.replace("--lr-decay-samples 660480000", "--lr-decay-iters 430000")
    text = text_of(words + "--world-size 1024")
    assert "this command will not start: --rampup-batch-size counts samples" in text
    assert "174,615,846,912 parameters" in text


def test_a_step_without_an_order_is_refused_as_by_the_run() -> None:
    """16 samples are 8 micro-batches of 2, 6 samples are 3: no groups of one for each of two stages."""
    words = (
        TINY + "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --world-size 2 "
    )
    assert of(words).workload.microbatches == 8
    with pytest.raises(FlagError, match=r"--global-batch-size.*groups of 2.* Fix: "):
        of(words + "--global-batch-size 6")
    ramp = "--train-samples 100 --rampup-batch-size 4 2 50 "
    text = text_of(words.replace("--train-iters 10 ", ramp))
    assert "this command will not start: --num-layers-per-virtual-pipeline-stage" in text


def test_what_does_not_fit_is_said() -> None:
    shallow = GPT3.replace("--pipeline-model-parallel-size 16", "--pipeline-model-parallel-size 4")
    assert "does not fit: " in text_of(shallow + "--world-size 1024")
    assert "does not fit: " not in text_of(GPT3 + "--world-size 1024")


def test_data_of_files_that_exist(tmp_path: Path) -> None:
    prefix = tmp_path / "text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for _ in range(10):
        builder.add_document(numpy.arange(200) % 100, [200])
    builder.finalize(f"{prefix}.idx")
    words = TINY.replace("--mock-data", f"--data-path {prefix} --split 80,20,0")
    # 160 samples of 128 tokens and one more from 8 documents of 200 tokens: 20481 / 1600 passes.
    assert f"{prefix}: weight 1, 160 samples, 13 epoch(s) of 1,600 tokens" in text_of(words)


def test_explaining_needs_little_memory() -> None:
    """No tensor of 175B parameters is made: the process stays as small as one that imports the library."""
    code = (
        "import runpy, sys; sys.argv = ['explain.py', *sys.argv[1:]]\n"
        "runpy.run_path('tools/explain.py', run_name='__main__')\n"
        # getrusage would count the process that started this one
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *GPT3.split(), "--world-size", "1024"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout.split()[-1]) < 1_000_000  # kilobytes


def test_theoretical_memory_tool() -> None:
    """The text recorded from v0.9 for this model (tests/golden/training/flops_and_memory.json, no micro-batch count)."""
    words = (
        "tools/report_theoretical_memory.py --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 "
        "--max-position-embeddings 2048 --micro-batch-size 1 --tensor-model-parallel-size 8 "
        "--pipeline-model-parallel-size 16 --sequence-parallel --recompute-granularity selective --vocab-file absent "
        "--merge-file absent --world-size 1536"
    )
    done = subprocess.run(
        [sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "Number of parameters in transformer layers in billions:  173.95\n"
        "Number of parameters in embedding layers in billions: 0.63\n"
        "Total number of parameters in billions: 174.58\n"
        "Number of parameters in most loaded shard in billions: 1.4376\n"
        "Number of parameters in other shards in billions: 1.3590\n"
        "Activation memory footprint per transformer layer: 102.0 MB\n"
        "Number of in-flight microbatches: 16\n"
        "Theoretical memory footprints: weight and optimizer=24678.64 MB, activation=9840.03 MB, total=34518.67 MB\n\n"
    )
    assert "assumed: vocabulary of 50257" in done.stderr
