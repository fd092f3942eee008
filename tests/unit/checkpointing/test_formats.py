"""What is written has v0.9's structure, and what older generations wrote is understood."""

from __future__ import annotations

import tarfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.enums import ModelType
from megatron.core.errors import CheckpointError
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.checkpointing.arguments import check_checkpoint_args
from megatron.training.checkpointing.legacy import adapt_weights
from tests.unit.checkpointing.toy import Run, ToyOptimizer, arguments, one_process, same

GOLDEN = Path(__file__).parents[2] / "golden" / "checkpoints"


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    with one_process():
        yield


def _recorded(tmp_path: Path, model: str) -> Path:
    with tarfile.open(GOLDEN / model / "checkpoints.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_torch_file_has_the_recorded_keys_in_order(tmp_path: Path) -> None:
    run = Run(
        arguments(
            tmp_path / "run", model_type=ModelType.encoder_or_decoder, params_dtype=torch.float32, hook=len
        )
    )
    run.step()
    run.save()
    ours = load_file(tmp_path / "run" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt")
    theirs = load_file(
        _recorded(tmp_path, "opt") / "torch_dp1" / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt"
    )
    assert list(ours) == [key for key in theirs if key != "opt_param_scheduler"]
    assert ours["checkpoint_version"] == theirs["checkpoint_version"] == 3.0
    assert list(ours["rng_state"][0]) == list(theirs["rng_state"][0])
    assert (
        ours["rng_state"][0]["rng_tracker_states"].keys()
        == theirs["rng_state"][0]["rng_tracker_states"].keys()
    )
    args = ours["args"]
    assert type(args) is Namespace and args.model_type == 1 and args.params_dtype is torch.float32
    assert not hasattr(args, "hook")  # only builtins and dtypes, so that any program can unpickle it


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("legacy_gpt", "v0"),
        ("legacy_gpt", "v1"),
        ("legacy_gpt", "v3_layernorm"),
        ("legacy_bert", "v0"),
        ("legacy_bert", "v1"),
    ],
)
def test_every_age_becomes_the_same_model(tmp_path: Path, model: str, source: str) -> None:
    """Old names and old row orders give the very weights of the newest file (heads 4)."""
    root = _recorded(tmp_path, model)

    def weights(directory: str) -> dict[str, Any]:
        (path,) = (root / directory).glob("*/mp_rank_00/model_optim_rng.pt")
        state = load_file(path)
        stack = "encoder" if "bert" in model else "decoder"
        wanted = [
            f"{stack}.final_layernorm.weight",
            f"{stack}.layers.0.self_attention.linear_qkv._extra_state",
        ]
        return adapt_weights(state["model"], wanted, state.get("checkpoint_version", 0), heads)

    (newest,) = (root / "tp1pp1").glob("*/mp_rank_00/model_optim_rng.pt")
    heads = load_file(newest)["args"].num_attention_heads
    expected, found = weights("tp1pp1"), weights(source)
    assert found.keys() == expected.keys()
    assert "output_layer.bias" in found or model == "legacy_gpt"
    for name, value in expected.items():
        assert value is None or torch.equal(found[name], value), name


def test_finetune_and_no_load_flags(tmp_path: Path) -> None:
    run = Run(arguments(tmp_path))
    run.step()
    run.save()
    tuned = Run(arguments(tmp_path, finetune=True))
    before = torch.get_rng_state()
    assert tuned.load() == 0
    assert same(tuned.weights(), run.weights()) and tuned.args.consumed_train_samples == 0
    assert not tuned.optimizer.state and torch.equal(torch.get_rng_state(), before)
    partly = Run(arguments(tmp_path, no_load_optim=True, no_load_rng=True))
    assert partly.load() == 1 and not partly.optimizer.state


def test_pretrained_checkpoint_is_used_when_load_is_empty(tmp_path: Path) -> None:
    run = Run(arguments(tmp_path / "first"))
    run.step()
    run.save()
    args = arguments(tmp_path / "second", pretrained_checkpoint=str(tmp_path / "first"))
    tuned = Run(args)
    assert tuned.load() == 0 and args.finetune and same(tuned.weights(), run.weights())
    args.pretrained_checkpoint, args.finetune = str(tmp_path / "nowhere"), False
    with pytest.raises(CheckpointError, match="--pretrained-checkpoint"):
        Run(args).load()


def test_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Run(arguments(tmp_path)).load() == 0
    assert "will start from random" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="--exit-on-missing-checkpoint"):
        Run(arguments(tmp_path, exit_on_missing_checkpoint=True)).load()


def test_ckpt_step(tmp_path: Path) -> None:
    run = Run(arguments(tmp_path))
    for _ in range(3):
        run.step()
        run.save()
    assert Run(arguments(tmp_path, ckpt_step=2)).load() == 2
    with pytest.raises(CheckpointError, match="it has: 1, 2, 3"):
        Run(arguments(tmp_path, ckpt_step=7)).load()


def test_checkpoints_without_optimizer_or_random_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that did not save them told so in its arguments; loading goes on with a note."""
    for ckpt_format in ("torch", "torch_dist"):
        args = arguments(
            tmp_path / ckpt_format, ckpt_format=ckpt_format, no_save_optim=True, no_save_rng=True
        )
        run = Run(args)
        run.step()
        run.save()
        assert Run(arguments(tmp_path / ckpt_format, ckpt_format=ckpt_format)).load() == 1
        printed = capsys.readouterr().out
        assert "the optimizer starts afresh" in printed and "no random states" in printed


def test_flags_of_the_distributed_format_are_named_where_files_are_of_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "dist_ckpt_strictness": "raise_all",
        "ckpt_fully_parallel_load": True,
        "args_given": ["dist_ckpt_strictness"],
    }
    for ckpt_format, said in (("torch", True), ("torch_dist", False)):
        directory = tmp_path / ckpt_format
        run = Run(arguments(directory, ckpt_format=ckpt_format))
        run.step()
        run.save()
        Run(arguments(directory, ckpt_format=ckpt_format, **flags)).load()
        printed = capsys.readouterr().out
        assert ("--dist-ckpt-strictness has no effect: " in printed) == said
        assert "--ckpt-fully-parallel-load" not in printed


def test_incompatible_settings_are_all_named(tmp_path: Path) -> None:
    saved = Namespace(num_layers=2, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=2)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint_args(saved, args=arguments(tmp_path, num_layers=4, hidden_size=16))
    text = str(caught.value)
    assert "num_layers value from checkpoint (2) is not equal to the input argument value (4)" in text
    assert "hidden_size" in text and "or pass --use-checkpoint-args" in text
    with pytest.raises(
        CheckpointError, match="--num-layers as in the checkpoint, or not at all: --use-checkpoint-args"
    ):
        check_checkpoint_args(saved, args=arguments(tmp_path, num_layers=4, use_checkpoint_args=True))
    with pytest.raises(CheckpointError, match=r"tensor_model_parallel_size .*convert.py"):
        check_checkpoint_args(saved, args=arguments(tmp_path), fixed_layout=True)


@pytest.mark.parametrize("learned", [False, True])
def test_rotary_positions_need_no_word_of_learned_ones(
    tmp_path: Path, learned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """v0.9's converters note that there are none, its scripts leave `--no-position-embedding` out, or the other way."""
    args = arguments(tmp_path, position_embedding_type="rope", add_position_embedding=not learned)
    saved = Namespace(**{**vars(args), "add_position_embedding": learned})
    check_checkpoint_args(saved, args=args)
    assert "add_position_embedding" not in capsys.readouterr().out
    saved.position_embedding_type = "learned_absolute"
    with pytest.raises(CheckpointError, match="set --position-embedding-type as in the checkpoint"):
        check_checkpoint_args(saved, args=args)


@pytest.mark.parametrize("finetune", [False, True])
def test_differences_are_shown_at_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finetune: bool
) -> None:
    """Only what differs, with both values and whether it matters."""
    same = {"seed": 1, "clip_grad": 1.0}
    run = Run(
        arguments(tmp_path, data_parallel_size=4, lr=1e-3, norm_epsilon=1e-5, moe_grouped_gemm=False, **same)
    )
    run.step()
    run.save()
    args = arguments(
        tmp_path,
        data_parallel_size=1,
        lr=1e-4,
        norm_epsilon=1e-6,
        moe_grouped_gemm=True,
        **same,
        finetune=finetune,
    )
    Run(args).load()
    (heading, *rows) = capsys.readouterr().out.partition("differ from this run's:\n")[2].splitlines()[:5]
    assert heading.split() == ["setting", "checkpoint", "this", "run", "does", "it", "matter"]
    assert [row.split(None, 3) for row in rows] == [
        ["norm_epsilon", "1e-05", "1e-06", "yes: same weights, other results"],
        ["data_parallel_size", "4", "1", "no: weights and optimizer are cut anew"],
        [
            "moe_grouped_gemm",
            "False",
            "True",
            "for the optimizer in the torch format: its state is of experts in one form",
        ],
        [
            "lr",
            "0.001",
            "0.0001",
            "an --override- or --use-checkpoint-opt_param-scheduler flag says which holds",
        ],
    ]


def test_use_checkpoint_args(tmp_path: Path) -> None:
    root = _recorded(tmp_path, "llama")
    for source, forced in (("tp2pp2", 2), ("torch_dist", 1)):
        args = arguments(
            root / source, num_layers=None, hidden_size=None, ffn_hidden_size=128, num_attention_heads=None,
            swiglu=False, normalization="LayerNorm", seq_length=None, kv_channels=None, padded_vocab_size=None,
            max_position_embeddings=None, tokenizer_type=None, num_query_groups=1, group_query_attention=False,
        )  # fmt: skip
        load_args_from_checkpoint(args)
        assert (args.num_layers, args.hidden_size, args.num_attention_heads) == (2, 64, 4)
        assert args.ffn_hidden_size == 128  # given on the command line
        assert args.swiglu and args.normalization == "RMSNorm" and args.num_query_groups == 2
        assert args.tensor_model_parallel_size == args.pipeline_model_parallel_size == forced
        assert args.iteration == 100


def test_non_persistent_checkpoints(tmp_path: Path) -> None:
    """Each save leaves the one before it, below the directory; the newest is preferred when at least as new."""
    options: dict[str, Any] = {"ckpt_format": "torch_dist", "non_persistent_save_interval": 1}
    run = Run(arguments(tmp_path, **options))
    for iteration in range(1, 5):
        run.step()
        run.save(non_persistent_ckpt=iteration != 1)
    kept = sorted(p.name for p in (tmp_path / "non_persistent").glob("iter_*"))
    assert kept == ["iter_0000003", "iter_0000004"]
    assert Run(arguments(tmp_path, **options)).load() == 4
    by_type = {"ckpt_format": "torch_dist", "non_persistent_ckpt_type": "global"}
    assert Run(arguments(tmp_path, **by_type)).load() == 4
    assert Run(arguments(tmp_path, ckpt_format="torch_dist")).load() == 1


def test_gathered_optimizers_need_their_layout(tmp_path: Path) -> None:
    """Optimizer state that lies as the ranks of a layout held it continues in that layout only; weights load in any."""
    options: dict[str, Any] = {
        "ckpt_format": "torch_dist",
        "use_distributed_optimizer": True,
        "ckpt_fully_parallel_save": False,
    }
    run = Run(arguments(tmp_path, tensor_model_parallel_size=2, **options))
    run.step()
    run.save()
    other = Run(arguments(tmp_path, **options))
    before = other.weights()
    with pytest.raises(
        RuntimeError, match=r"mismatch: .* ranks of \(2, 1, 0\), and this run has \(1, 1, 0\)"
    ):
        other.load()
    assert same(before, other.weights())
    weights_alone = Run(arguments(tmp_path, no_load_optim=True, **options))
    assert weights_alone.load() == 1 and same(weights_alone.weights(), run.weights())


class _InBuckets(ToyOptimizer):
    """Says that its tensors lie in bucket space, as optimizers did before February 2024."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked_for: list[str] = []

    def sharded_state_dict(
        self, model_state: dict[str, Any], is_loading: bool = False, sharding_type: str = "", **_: Any
    ) -> dict[str, Any]:
        self.asked_for.append(sharding_type)
        return {**self.state_dict(), "param_state_sharding_type": "fully_sharded_bucket_space"}


def test_optimizers_are_read_as_their_checkpoint_says_they_lie(tmp_path: Path) -> None:
    args = arguments(tmp_path, ckpt_format="torch_dist", use_distributed_optimizer=True)
    run = Run(args)
    run.optimizer = _InBuckets(run.model.parameters(), lr=0.1)
    run.step()
    run.save()
    args.consumed_train_samples = 0
    assert run.load() == 1
    assert run.optimizer.asked_for == ["fully_sharded_model_space", "fully_sharded_bucket_space"]
