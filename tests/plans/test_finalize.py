"""Derivations touch what they declare, and the pass from a command line to configurations carries values through."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron.core.activations import squared_relu
from megatron.core.errors import FlagError
from megatron.core.flags import Flag
from megatron.core.kernels import capability
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import arguments
from megatron.training.config import build, finalize, parser, rules

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --seq-length 32 --max-position-embeddings 64 "
    "--micro-batch-size 2 --train-iters 10 --lr 1e-3"
)


@pytest.fixture(autouse=True)
def _laptop(monkeypatch: pytest.MonkeyPatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with capability.pretend(capability.Capabilities()):
        yield


def finished(more: str = "", world_size: int = 1, **defaults: Any) -> Namespace:
    args = arguments.parse_args(argv=[*BASE.split(), *more.split()])
    args.world_size = world_size
    return arguments.validate_args(args, defaults)


class Recorder:
    """Stands before a Namespace and notes which attributes are read and written."""

    def __init__(self, args: Namespace) -> None:
        self.__dict__["_state"] = (args, set(), set())

    def __getattr__(self, name: str) -> Any:
        args, read, _ = self.__dict__["_state"]
        read.add(name)
        return getattr(args, name)

    def __setattr__(self, name: str, value: Any) -> None:
        args, _, written = self.__dict__["_state"]
        written.add(name)
        setattr(args, name, value)

    def __delattr__(self, name: str) -> None:
        args, _, written = self.__dict__["_state"]
        written.add(name)
        delattr(args, name)


@pytest.mark.parametrize(
    "more",
    [
        "", "--bf16 --swiglu --sequence-parallel --disable-bias-linear --data-path a",
        "--fp16 --use-rotary-position-embeddings --num-experts 0 --recompute-activations",
        "--encoder-pipeline-model-parallel-size 1 --apply-query-key-layer-scaling",
        "--num-layers 8 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2",
        "--pipeline-model-parallel-size 4 --pipeline-model-parallel-split-rank 2 --standalone-embedding-stage",
        "--num-experts 2 --moe-use-upcycling --save ckpt --save-interval 5",
    ],
)  # fmt: skip
def test_steps_touch_what_they_declare(more: str) -> None:
    args = arguments.parse_args(argv=[*BASE.split(), *more.split()])
    args.world_size = 8
    for step in finalize.STEPS:
        recorder = Recorder(args)
        step.run(recorder)
        _, read, written = recorder.__dict__["_state"]
        assert read <= step.reads | step.writes, step.name
        assert written <= step.writes, step.name


def test_steps_read_what_exists() -> None:
    known = set(vars(arguments.parse_args(argv=[])))
    for step in finalize.STEPS:
        assert step.reads <= known, step.name
        known |= step.writes


@pytest.mark.parametrize(
    ("sizes", "world_size", "expected"),
    [
        ("2 1 1 0 0", 8, 4),
        ("2 2 1 0 0", 8, 2),
        ("1 2 2 0 0", 8, 2),
        ("2 2 1 1 2", 12, 2),
        ("4 1 2 0 0", 8, 1),
    ],
)
def test_data_parallel_size(sizes: str, world_size: int, expected: int) -> None:
    tensor, pipeline, context, encoder_tensor, encoder_pipeline = map(int, sizes.split())
    args = Namespace(
        world_size=world_size, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
        context_parallel_size=context, encoder_tensor_model_parallel_size=encoder_tensor,
        encoder_pipeline_model_parallel_size=encoder_pipeline,
    )  # fmt: skip
    finalize.data_parallel_size(args)
    assert args.data_parallel_size == expected


@pytest.mark.parametrize(
    ("hidden", "width"), [(64, 128), (768, 2048), (1024, 2688), (4096, 10880), (5120, 13632)]
)
def test_swiglu_width(hidden: int, width: int) -> None:
    """8/3 of the width, rounded down to a multiple of 64 (training specification, section 2)."""
    args = Namespace(ffn_hidden_size=None, swiglu=True, hidden_size=hidden)
    finalize.mlp_width(args)
    assert args.ffn_hidden_size == width


def test_fallbacks_and_derived_values_are_said() -> None:
    args = finished(
        "--data-path a --sequence-parallel --no-one-logger --log-memory-to-tensorboard --vocab v.json "
        "--log-timers-to-tensorboard"
    )
    lines = "\n".join(arguments.notices(args))
    for word in ("--transformer-impl", "gloo", "--split", "--sequence-parallel", "--global-batch-size",
                 "--no-one-logger has no effect", "--log-memory-to-tensorboard has no effect",
                 "--log-timers-to-tensorboard has no effect", "--vocab-file"):  # fmt: skip
        assert word in lines
    assert args.vocab_file == "v.json"


def test_defaults_are_preferences() -> None:
    """Typing the default of a fallback is a demand."""
    assert finished().transformer_impl == "local"
    assert finished("--transformer-impl local").transformer_impl == "local"
    with pytest.raises(FlagError, match="--transformer-impl"):
        finished("--transformer-impl transformer_engine")
    with capability.pretend(capability.Capabilities(compute=(9, 0), packages={"transformer_engine": "1.9"})):
        assert finished("--no-async-tensor-model-parallel-allreduce").transformer_impl == "transformer_engine"


def test_old_spellings_are_accepted() -> None:
    args = arguments.parse_args(
        argv=[
            "--local_rank=2",
            "--dataset-impl",
            "mmap",
            "--vocab",
            "a",
            "--chunk-size",
            "25",
            "--json-key",
            "text",
            "--bf16",
        ]
    )
    assert (args.local_rank, args.vocab_file, args.bf16) == (2, "a", True)
    assert len(args.notices) == 5


def test_extra_flags_and_unknown_words() -> None:
    def extra(parser: Any) -> Any:
        parser.add_argument_group("mine").add_argument("--vocab", type=int, default=3)
        return parser

    args = arguments.parse_args(extra, argv=["--vocab", "5"])
    assert (args.vocab, args.vocab_file, args.notices) == (5, None, [])
    args = arguments.parse_args(ignore_unknown_args=True, argv=["--never-seen", "5", "--bf16"])
    assert args.bf16 and args.args_given == ["bf16"]


def test_arguments_are_printed_like_v09(capsys: pytest.CaptureFixture) -> None:
    args = finished()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "------------------------ arguments ------------------------"
    assert lines[-1] == "-------------------- end of arguments ---------------------"
    assert "  hidden_size ..................................... 64" in lines
    names = [line.split()[0] for line in lines[1:-1]]
    assert names == sorted(names, key=str.lower)
    assert set(names) == set(vars(args)) - {"args_given", "notices"}


def test_print_config_tells_origins(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        finished("--print-config")
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code
    for line in ("hidden_size = 64  # command line", "kv_channels = 8  # derived", "seed = 1234  # default"):
        assert line in lines


def test_stages_exchange_what_layers_hand_on() -> None:
    for flags, expected in (("", torch.bfloat16), ("--fp32-residual-connection", torch.float32)):
        transformer = build.configs(finished(f"--bf16 {flags}")).transformer
        assert (transformer.params_dtype, transformer.pipeline_dtype) == (torch.bfloat16, expected)


def test_configurations_carry_values_through() -> None:
    configs = build.configs(finished(
        "--bf16 --norm-epsilon 1e-6 --apply-layernorm-1p --group-query-attention --num-query-groups 2 "
        "--no-masked-softmax-fusion --no-persist-layer-norm --num-experts 4 --ddp-bucket-size 1000 --min-lr 1e-5 "
        "--decoder-first-pipeline-num-layers 1 --use-distributed-optimizer --no-barrier-with-level-1-timing"
    ))  # fmt: skip
    transformer, optimizer, ddp = configs.transformer, configs.optimizer, configs.ddp
    assert (transformer.params_dtype, transformer.pipeline_dtype) == (torch.bfloat16, torch.bfloat16)
    assert (transformer.layernorm_epsilon, transformer.layernorm_zero_centered_gamma) == (1e-6, True)
    assert (transformer.num_query_groups, transformer.num_moe_experts) == (2, 4)
    assert (transformer.masked_softmax_fusion, transformer.persist_layer_norm) == (False, False)
    assert (transformer.attention_softmax_in_fp32, transformer.bias_dropout_fusion) == (False, True)
    assert (transformer.deallocate_pipeline_outputs, transformer.batch_p2p_comm) == (True, True)
    assert transformer.first_pipeline_num_layers == 1
    assert (optimizer.bf16, optimizer.min_lr, optimizer.use_distributed_optimizer) == (True, 1e-5, True)
    assert (transformer.barrier_with_L1_time, optimizer.barrier_with_L1_time) == (False, False)
    assert (ddp.grad_reduce_in_fp32, ddp.check_for_nan_in_grad, ddp.bucket_size) == (True, True, 1000)
    assert ddp.use_distributed_optimizer


@pytest.mark.parametrize(
    ("more", "function", "gated", "fused"),
    [
        ("", F.gelu, False, True),
        ("--no-bias-gelu-fusion", F.gelu, False, False),
        ("--disable-bias-linear", F.gelu, False, False),
        ("--swiglu", F.silu, True, True),
        ("--swiglu --no-bias-swiglu-fusion", F.silu, True, False),
        ("--squared-relu", squared_relu, False, False),
    ],
)
def test_activation(more: str, function: Any, gated: bool, fused: bool) -> None:
    config = arguments.core_transformer_config_from_args(finished(more))
    assert (config.activation_func, config.gated_linear_unit, config.bias_activation_fusion) == (
        function,
        gated,
        fused,
    )


def test_initialisers() -> None:
    normal = arguments.core_transformer_config_from_args(finished("--init-method-std 0.5"))
    torch.manual_seed(0)
    weight = torch.empty(400, 400)
    normal.init_method(weight)
    assert weight.std().item() == pytest.approx(0.5, rel=0.02)
    normal.output_layer_init_method(weight)
    assert weight.std().item() == pytest.approx(0.5 / 8**0.5, rel=0.02)
    xavier = arguments.core_transformer_config_from_args(finished("--init-method-xavier-uniform"))
    xavier.init_method(weight)
    assert weight.abs().max().item() == pytest.approx((6 / 800) ** 0.5, rel=0.01)


def test_encoder_configuration() -> None:
    args = finished("--encoder-pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 "
                    "--encoder-tensor-model-parallel-size 1 --pipeline-model-parallel-size 2", world_size=6)  # fmt: skip
    args.encoder_num_layers = 6
    decoder = build.transformer_config(args)
    encoder = build.encoder_config(args, decoder)
    assert (encoder.num_layers, encoder.pipeline_model_parallel_size, encoder.tensor_model_parallel_size) == (
        6,
        2,
        1,
    )
    assert (decoder.num_layers, decoder.pipeline_model_parallel_size, decoder.tensor_model_parallel_size) == (
        4,
        2,
        2,
    )


def test_users_subclass_takes_arguments_by_name() -> None:
    from dataclasses import dataclass

    @dataclass
    class Mine(TransformerConfig):
        rotary_base: int = 5
        unheard_of: int = 7

    config = arguments.core_transformer_config_from_args(finished("--rotary-base 500"), Mine)
    assert (config.rotary_base, config.unheard_of) == (500, 7)


def test_library_needs_no_command_line() -> None:
    config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4)
    assert (config.ffn_hidden_size, config.kv_channels, config.num_query_groups) == (256, 16, 4)
    assert config.attention_softmax_in_fp32 and not config.masked_softmax_fusion


def test_yaml_lies_beneath_the_command_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORPUS", "/data/corpus")
    path = tmp_path / "gpt.yaml"
    path.write_text(
        "language_model:\n  num_layers: 6\n  hidden_size: 96\n  num_attention_heads: 6\n  activation_func: swiglu\n"
        "  persist_layer_norm: false\n  layernorm_epsilon: 1e-6\n  num_query_groups: 3\n  init_method: null\n"
        "model_parallel:\n  bf16: true\n  timers: null\n"
        "seq_length: 16\nmax_position_embeddings: 64\nmicro_batch_size: 1\ntrain_iters: 7\n"
        "data_path: 0.5 ${CORPUS}_a 0.5 ${CORPUS}_b\n"
    )
    args = arguments.parse_args(argv=["--yaml-cfg", str(path), "--num-layers", "2", "--seq-length", "32"])
    arguments.validate_args(args)
    assert (args.num_layers, args.hidden_size, args.seq_length, args.norm_epsilon) == (2, 96, 32, 1e-6)
    assert args.data_path == ["0.5", "/data/corpus_a", "0.5", "/data/corpus_b"]
    config = arguments.core_transformer_config_from_args(args)
    assert config.activation_func is F.silu and config.gated_linear_unit
    assert (config.num_query_groups, config.persist_layer_norm, config.bf16) == (3, False, True)


@pytest.mark.parametrize("aligned", [True, False])
def test_yaml_may_call_flags_as_the_sample_of_v0_9_does(aligned: bool, tmp_path: Any) -> None:
    path = tmp_path / "gpt.yaml"
    path.write_text(f"delay_grad_reduce: {aligned}\ndelay_param_gather: {aligned}\n")
    args = arguments.parse_args(argv=["--yaml-cfg", str(path)])
    assert (args.align_grad_reduce, args.align_param_gather) == (aligned, aligned)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("hiden_size: 64", "hidden_size"), ("seq_length: long", "seq_length"), ("normalization: none", "RMSNorm"),
        ("data_path: ${NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"), ("- 1", "name: value"), ("a: [", "not YAML"),
        ("language_model:\n  activation_func: mish", "mish"), ("bf16: 3", "bf16"),
    ],
)  # fmt: skip
def test_yaml_errors_teach(text: str, word: str, tmp_path: Any) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(FlagError, match="--yaml-cfg") as raised:
        arguments.parse_args(argv=["--yaml-cfg", str(path)])
    assert word in str(raised.value)


def test_ignored_flags_are_about_what_was_typed() -> None:
    assert rules.ignored_flags(finished()) == []
    assert len(rules.ignored_flags(finished("--use-mcore-models --no-one-logger"))) == 2


def words(spelled: str) -> list[str]:
    """A flag as it may be typed: with a value of its kind if the declaration names none."""
    spelling, *value = spelled.split()
    flag = parser.by_spelling()[spelling]
    if flag.action != "store" or value:
        return [spelling, *value]
    if flag.choices:
        return [spelling, str(next(c for c in flag.choices if c not in (None, flag.cli_default)))]
    return [spelling, {int: "2", float: "0.5"}.get(flag.parse, "text")]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "flag",
    [flag for flag in parser.all_flags() if flag.needs and flag.status == "stable"],
    ids=lambda f: f.dest,
)
def test_a_flag_that_needs_others_says_so_without_them(flag: Flag) -> None:
    def complaints(*spelled: str) -> list[str]:
        argv = [*BASE.split(), *(word for name in spelled for word in words(name))]
        ignored = rules.ignored_flags(arguments.parse_args(argv=argv))
        return [line for line in ignored if line.startswith(f"{flag.spellings[0]} has no")]

    without = ["--optimizer sgd"] if "--optimizer adam" in flag.needs else []  # adam is the default
    alone = complaints(*without, flag.spellings[0])
    assert len(alone) == 1 and "it needs --" in alone[0]
    beside = [condition.split(" or ")[0] for condition in flag.needs]
    assert complaints(flag.spellings[0], *beside) == []


@pytest.mark.parametrize(
    ("flag", "other"),
    [(flag, other) for flag in parser.all_flags() for c in flag.unless for other in c.split(" or ")],
    ids=lambda value: value.dest if isinstance(value, Flag) else value,
)
def test_a_flag_that_another_overrules_says_so(flag: Flag, other: str) -> None:
    def complaints(*spelled: str) -> list[str]:
        needed = [condition.split(" or ")[0] for condition in flag.needs]
        argv = [*BASE.split(), *(word for name in (*needed, *spelled) for word in words(name))]
        return [line for line in rules.ignored_flags(arguments.parse_args(argv=argv)) if "beside" in line]

    assert complaints(flag.spellings[0]) == complaints(other) == []
    assert complaints(flag.spellings[0], other) == [f"{flag.spellings[0]} has no effect beside {other}"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("--fp16 --loss-scale 0 --hysteresis 3", ""),  # 0 asks for the dynamic scale
        ("--fp16 --loss-scale 2 --hysteresis 3", "--hysteresis has no effect beside --loss-scale"),
        ("--train-data-path a --valid-data-path s3://b/c --s3-cache-path d", ""),
        ("--data-path 1 a 1 b --s3-cache-path d", "--s3-cache-path has no effect: no data path is in"),
        ("--wandb-project p --wandb-exp-name e --tensorboard-dir t", ""),
        ("--wandb-project p --wandb-exp-name e", "--wandb-project receives no losses"),
        (
            "--data-path a --renormalize-blend-weights",
            "--renormalize-blend-weights: no effect on one dataset",
        ),
        ("--data-path 1 a 1 b --num-dataset-builder-threads 2", ""),
        ("--mock-data --data-cache-path d", ""),
        ("--no-initialization --load a", ""),
        ("--fp8-format hybrid --first-last-layers-bf16", ""),
        (
            "--fp8-format hybrid --first-last-layers-bf16 --num-layers-at-start-in-bf16 3",
            "--fp8-format has no effect: --first-last-layers-bf16 keeps every layer",
        ),
        (
            "--lr-decay-style constant --lr-decay-iters 5",
            "--lr-decay-iters has no effect beside --lr-decay-style",
        ),
        ("--lr-decay-style constant --lr-decay-iters 5 --lr-warmup-fraction 0.1", ""),
        ("--fp16 --no-check-for-nan-in-loss-and-grad", "--no-check-for-nan-in-loss-and-grad has no effect"),
        ("--fp16 --loss-scale 2 --no-check-for-nan-in-loss-and-grad", ""),
        ("--profile", "--profile has no effect: it would start after step 10"),
        ("--profile --profile-step-start 3 --profile-ranks 0 5", "--profile-ranks: there is no rank 5"),
        ("--profile --profile-step-start 3", ""),
        ("--load a --ckpt-convert-format torch_dist --ckpt-convert-save b --no-save-rng", ""),
        (
            "--load a --ckpt-convert-format torch_dist --ckpt-convert-save b --ckpt-format torch "
            "--no-ckpt-fully-parallel-save",
            "",
        ),
        ("--load a --non-persistent-ckpt-type global --non-persistent-global-ckpt-dir b", ""),
    ],
)
def test_notices_are_true(more: str, line: str) -> None:
    said = [text for text in arguments.notices(finished(more)) if text.startswith("--") and " no " in text]
    assert [text.startswith(line) for text in said] == ([True] if line else [])


@pytest.mark.parametrize(
    ("model", "script"), [("GPT", "gpt"), ("hybrid models", "mamba"), ("BERT", "bert"), ("T5", "t5")]
)
def test_flags_for_other_models_are_named(model: str, script: str) -> None:
    """A typed flag that the entry script reads nowhere; what it does read is not in the list."""
    unread = rules.UNREAD[model]
    source = (Path(__file__).parents[2] / f"pretrain_{script}.py").read_text()
    assert not [dest for dest in unread if f"args.{dest}" in source]
    args = arguments.parse_args(argv=[*BASE.split(), "--max-tokens-to-oom", "3", "--decoder-seq-length", "8"])
    lines = rules.unread_flags(args, model, unread, parser.all_flags())
    expected = ["--max-tokens-to-oom"] if model == "T5" else ["--decoder-seq-length", "--max-tokens-to-oom"]
    assert sorted(lines) == [f"{name} has no effect on {model}" for name in expected]
    assert rules.unread_by(model, args) == lines
    assert rules.unread_by(None, args) == []


@pytest.mark.parametrize(
    ("pattern", "lines"),
    [
        ("M*-M", []),
        ("M*MM", ["--swiglu has no effect on hybrid models without MLP layers"]),
        ("M-MM", ["--attention-dropout has no effect on hybrid models without attention layers"]),
    ],
)
def test_flags_for_layers_that_a_hybrid_model_lacks_are_named(pattern: str, lines: list[str]) -> None:
    words = [*BASE.split(), "--hybrid-override-pattern", pattern, "--swiglu", "--attention-dropout", "0.2"]
    assert rules.unread_by("hybrid models", arguments.parse_args(argv=words)) == lines
