"""Every rule has a command line that breaks it: the process ends with status 2 and one line that names the flags."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from megatron.core import model_parallel_config
from megatron.core.errors import DataError, FlagError
from megatron.core.flags import Rule
from megatron.core.kernels import capability
from megatron.core.transformer import transformer_config
from megatron.training import arguments, cli
from megatron.training.config import build, parser, rules

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --seq-length 32 --max-position-embeddings 64 "
    "--micro-batch-size 2 --train-iters 10 --lr 1e-3 --mock-data"
)
CORE_RULES = [*model_parallel_config.RULES, *transformer_config.SHAPE_RULES, *transformer_config.RULES]
ALL_RULES = list(
    dict.fromkeys([*rules.GIVEN, *rules.DERIVED, *rules.TRAINING, *rules.FROM_FILES, *CORE_RULES])
)
MACHINES = {
    "cpu": capability.Capabilities(),
    "cuda": capability.Capabilities(compute=(7, 0), device_name="V100", torch_version="2.13.0"),
}

#: Command lines that no rule, but parsing or a derivation refuses: (added to BASE, words the message must hold).
OTHERS = {
    "--no-such-flag": "--no-such-flag",
    "--num-layer 4": "--num-layer --num-layers",
    "--hiden-size 64": "--hiden-size --hidden-size",
    "--tensor-parallel-size 2": "--tensor-parallel-size --tensor-model-parallel-size",
    "stray": "stray",
    "--num-layers four": "--num-layers four",
    "--lr fast": "--lr fast",
    "--normalization BatchNorm": "--normalization BatchNorm",
    "--position-embedding-type alibi": "--position-embedding-type alibi",
    "--lr-decay-style step": "--lr-decay-style step",
    "--optimizer lion": "--optimizer lion",
    "--ckpt-format safetensors": "--ckpt-format safetensors",
    "--tokenizer-type Words": "--tokenizer-type Words",
    "--transformer-impl apex": "--transformer-impl apex",
    "--moe-token-dispatcher-type ring": "--moe-token-dispatcher-type ring",
    "--dist-ckpt-strictness strict": "--dist-ckpt-strictness strict",
    "--distributed-backend mpi": "--distributed-backend mpi",
    "--timing-log-level 3": "--timing-log-level 3",
    "--non-persistent-ckpt-type None": "--non-persistent-ckpt-type",
    "--context-parallel-algo tree": "--context-parallel-algo tree",
    "--save": "--save",
    "--profile-ranks": "--profile-ranks",
    "--tensor-model-parallel-size 3 --num-attention-heads 6 --kv-channels 8 @4": "--tensor-model-parallel-size 3 4",
    "--pipeline-model-parallel-size 2 @3": "--pipeline-model-parallel-size 2 3",
    "--batch-size 4": "--batch-size --micro-batch-size",
    "--warmup 5": "--warmup --lr-warmup-fraction",
    "--model-parallel-size 2": "--model-parallel-size --tensor-model-parallel-size",
    "--checkpoint-activations": "--checkpoint-activations --recompute-activations",
    "--use-legacy-models --ckpt-format torch": "--use-legacy-models",
    "--retro-add-retriever": "--retro-add-retriever Retro",
    "--vision-pretraining": "--vision-pretraining vision",
    "--ict-load ckpt": "--ict-load retrieval",
    "--adlr-autoresume": "--adlr-autoresume",
    "--enable-ft-package": "--enable-ft-package",
    "--lazy-mpu-init yes": "--lazy-mpu-init",
    "--use-ring-exchange-p2p": "--use-ring-exchange-p2p",
    "--yaml-cfg missing.yaml": "--yaml-cfg missing.yaml",
}  # fmt: skip


def command_line(bad: str) -> list[str]:
    """BASE with the words of `bad` added; a word such as -num-layers removes that flag from BASE."""
    words = BASE.split()
    for word in bad.split():
        if not re.match(r"-[a-z]", word):
            words.append(word)
            continue
        position = words.index("-" + word)
        takes_value = position + 1 < len(words) and not words[position + 1].startswith("--")
        del words[position : position + 1 + takes_value]
    return words


def smallest_world(argv: list[str]) -> int:
    """The ranks that one replica of the command line's model needs, times its expert-parallel size."""
    args = parser.parse(argv)
    encoder = args.encoder_tensor_model_parallel_size * args.encoder_pipeline_model_parallel_size
    decoder = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    return max(1, (encoder + decoder) * args.context_parallel_size * args.expert_model_parallel_size)


def resolve(argv: list[str]) -> None:
    args = arguments.parse_args(argv=argv)
    arguments.validate_args(args, {"tokenizer_type": "NullTokenizer"})
    arguments.validate_for_training(args)
    rules.check(args, rules.FROM_FILES)
    build.configs(args)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a command line in process; returns its message after checking that it is one line with exit status 2."""

    def run(argv: list[str], machine: str, world_size: int) -> str:
        for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_ALGO", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        with capability.pretend(MACHINES[machine]), pytest.raises(SystemExit) as ended:
            cli.run_main(lambda: resolve(argv))
        message = capsys.readouterr().err
        assert ended.value.code == 2, message
        assert message.startswith("error: ") and message.count("\n") == 1, message
        assert " Fix: " in message
        return message

    return run


@pytest.mark.parametrize("name", ["cpu"])
def test_the_base_is_good(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with capability.pretend(MACHINES[name]):
        resolve(BASE.split())


@pytest.mark.parametrize(
    "rule", [rule for rule in ALL_RULES if rule.bad], ids=lambda rule: rule.holds.__name__
)
def test_counter_examples_are_refused(rule: Rule, refused: Callable[..., str]) -> None:
    """A configuration's rule may be anticipated by one about the arguments; both name the flags it is about."""
    argv = command_line(rule.bad)
    message = refused(argv, rule.device or "cpu", smallest_world(argv))
    named = [flag for flag in rule.flags if flag in message]
    assert named == list(rule.flags) or (rule in CORE_RULES and named), message


def test_reduction_needs_one_connection_on_cuda(refused: Callable[..., str]) -> None:
    message = refused(BASE.split(), "cuda", 1)
    assert (
        "CUDA_DEVICE_MAX_CONNECTIONS" in message and "--no-async-tensor-model-parallel-allreduce" in message
    )


def test_fp8_parameters_need_own_layers_where_transformer_engine_is_installed(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        MACHINES, "H100", capability.Capabilities(compute=(9, 0), packages={"transformer_engine": "1.11"})
    )
    argv = command_line(
        "--bf16 --fp8-format hybrid --fp8-param-gather --use-distributed-optimizer "
        "--no-async-tensor-model-parallel-allreduce"
    )
    message = refused(argv, "H100", 1)
    assert "--fp8-param-gather, --transformer-impl" in message


def test_only_batches_that_a_ramp_up_takes_must_fit(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 4 to 16 in six steps of 2 over 10 samples: 4, then 8 (4 samples are past two of the six steps), then 16."""
    words = (
        "-train-iters --train-samples 100 --global-batch-size 16 --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1 --rampup-batch-size 4 2 "
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    resolve(command_line(words + "10"))
    # Over 60 samples each step of 2 comes in its turn, and the second step's 3 micro-batches are no groups of 2.
    message = refused(command_line(words + "60"), "cpu", 2)
    assert "--num-layers-per-virtual-pipeline-stage" in message and "--rampup-batch-size" in message
    assert "start from and rise by multiples" in message


@pytest.mark.parametrize("bad", OTHERS)
def test_other_bad_command_lines_are_refused(bad: str, refused: Callable[..., str]) -> None:
    words, _, world_size = bad.partition(" @")
    message = refused(command_line(words), "cpu", int(world_size or 1))
    assert all(word in message for word in OTHERS[bad].split()), message


def test_there_are_a_hundred() -> None:
    assert len(OTHERS) + sum(bool(rule.bad) for rule in ALL_RULES) >= 100


#: Rules that no command line reaches, with configuration values that break them.
LIBRARY_ONLY = {
    "sequence_parallel_needs_tensor_parallel": {"sequence_parallel": True},
    "pipeline_needs_dtype": {"pipeline_model_parallel_size": 2},
    "offloaded_layers_exist": {"cpu_offloading": True, "cpu_offloading_num_layers": 9},
    "offloading_needs_one_stage": {"cpu_offloading": True, "pipeline_model_parallel_size": 2, "pipeline_dtype": "any"},
    "offloading_excludes_recomputation": {"cpu_offloading": True, "recompute_granularity": "selective"},
    "recomputation_divides_into_chunks": {
        "recompute_granularity": "selective", "virtual_pipeline_model_parallel_size": 3,
    },
    "granularity_is_known": {"recompute_granularity": "some"},
    "method_is_known": {"recompute_granularity": "full", "recompute_method": "any", "recompute_num_layers": 1},
    "fused_activation_exists": {"bias_activation_fusion": True, "activation_func": "another"},
    "fused_gelu_has_a_bias": {"bias_activation_fusion": True, "add_bias_linear": False},
    "fp8_store_needs_swiglu": {"activation_func_fp8_input_store": True},
}  # fmt: skip


@pytest.mark.parametrize(
    "rule", [rule for rule in CORE_RULES if not rule.bad], ids=lambda rule: rule.holds.__name__
)
def test_library_rules_raise_value_errors(rule: Rule) -> None:
    values = LIBRARY_ONLY[rule.holds.__name__]
    with pytest.raises(ValueError) as raised:
        transformer_config.TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, **values)
    assert raised.value.rule is rule
    assert "TransformerConfig" in str(raised.value)


def test_a_configuration_may_describe_no_model() -> None:
    """Wrappers, schedules and optimizers are given one too: v0.9's own width, 0, is no mistake there."""
    config = transformer_config.TransformerConfig(num_layers=1, num_attention_heads=1)
    assert (config.hidden_size, config.ffn_hidden_size, config.kv_channels) == (0, 0, 0)


def test_messages_are_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What follows from the command line alone is printed by rank 0; what depends on a machine, once on each."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    spoken = {}
    for error in (FlagError("--a", "b", "c"), cli.MachineError("--a", "b", "c"), DataError("file", "b", "c")):
        for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))
            with pytest.raises(SystemExit):
                cli.stop(error)
            spoken.setdefault(type(error).__name__, []).append(bool(capsys.readouterr().err))
    assert spoken == {
        "FlagError": [True, False, False, False],
        "MachineError": [True, False, True, False],
        "DataError": [True, False, True, False],
    }
