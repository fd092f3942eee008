"""Programs derived from v0.9's: their entry scripts train as ours do, and find what they import."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron.core.errors import FlagError
from megatron.core.models.gpt.gpt_layer_specs import _get_mlp_module_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.training import get_args
from tests.gang.harness import run_gang
from tests.runs import derived_script, pretraining

SCRIPT = "tests.runs.derived_script"
ROOT = Path(__file__).parents[2]
FLAGS = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 --lr 1e-2 "
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 2 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 127 --eval-iters 1 --eval-interval 2 --log-interval 1 --timing-log-level 2 --num-workers 0"
)
LAYOUTS = [
    (4, "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"),
    pytest.param(1, "", marks=pytest.mark.slow),
    pytest.param(
        4,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --context-parallel-size 2 --bf16",
        marks=pytest.mark.slow,
    ),
]
#: What programs import, by address.
NAMES = {
    "megatron.legacy.model": "GPTModel BertModel T5Model Float16Module",
    "megatron.legacy.model.gpt_model": "GPTModel",
    "megatron.legacy.model.bert_model": "BertModel",
    "megatron.legacy.model.t5_model": "T5Model",
    "megatron.legacy.model.module": "MegatronModule Float16Module param_is_not_shared fp32_to_float16 float16_to_fp32",
    "megatron.legacy.data.data_samplers": "build_pretraining_data_loader MegatronPretrainingSampler "
    "MegatronPretrainingRandomSampler RandomSeedDataset",
    "megatron.legacy.fused_kernels": "load",
    "pretrain_gpt": "model_provider get_batch loss_func forward_step is_dataset_built_on_rank "
    "core_gpt_dataset_config_from_args train_valid_test_datasets_provider",
    "pretrain_bert": "model_provider get_batch loss_func forward_step train_valid_test_datasets_provider",
    "pretrain_t5": "model_provider get_batch forward_step train_valid_test_datasets_provider t5_embedding_ranks "
    "t5_position_embedding_ranks",
    "pretrain_mamba": "model_provider forward_step train_valid_test_datasets_provider",
}


def steps(world: int, words: list[str], script: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, of the last rank."""
    *_, rows = run_gang(world, pretraining.records, words, script)
    return [(row["lm loss"], row["grad_norm"]) for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize(("world", "more"), LAYOUTS)
def test_a_derived_script_trains_as_ours(world: int, more: str) -> None:
    words = [*FLAGS.split(), *more.split()]
    ours = steps(world, words, "pretrain_gpt")
    assert len(ours) == 2 and steps(world, words, SCRIPT) == ours


def refusal(words: list[str]) -> str:
    """Body: why our own script does not start."""
    with pytest.raises(FlagError) as raised:
        pretraining.run_script(words)
    return str(raised.value)


def test_samples_may_be_a_programs_own() -> None:
    """v0.9 accepts a command line that names no data, and leaves them to the program's provider."""
    words = FLAGS.replace("--mock-data ", "").split()
    own = steps(1, words, SCRIPT)
    assert len(own) == 2 and own[1][0] < own[0][0]
    (said,) = run_gang(1, refusal, words)
    assert "--mock-data, --data-path: there is nothing to train on" in said


def collected(words: list[str], serial: pretraining.Observed | None = None) -> tuple[Any, int, Any]:
    """Body: (iteration, losses per token of each micro-batch) of evaluations' extra pass; validation samples read; the run.

    It starts from the weights of `serial`.
    """
    kept: list[tuple[int, list[Tensor]]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(
            derived_script, "process_collected", lambda data, step, _: kept.append((step, data))
        ),
    ):
        words = [*words, "--tensorboard-dir", folder]
        if serial is None:
            run: Any = pretraining.observe(words, SCRIPT)
        else:
            run = pretraining.compare(words, serial, SCRIPT)
    return kept, get_args().consumed_valid_samples, run


@pytest.mark.parametrize(
    ("layout", "own"),
    [
        ("--tensor-model-parallel-size 2", slice(None)),
        ("--pipeline-model-parallel-size 2", slice(None)),
        ("", slice(1, None, 2)),  # the second replica's micro-batches
    ],
)
def test_every_layout_collects_what_one_process_does(layout: str, own: slice) -> None:
    alike = (
        "--attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 64 --log-num-zeros-in-grad"
    )
    words = FLAGS.replace("--mock-data", alike).split()
    ((expected, read, serial),) = run_gang(1, collected, words)
    assert [step for step, _ in expected] == [2, 2, 2] and len(expected[0][1]) == 4
    (nothing, *_), (found, read_there, _) = run_gang(2, collected, [*words, *layout.split()], serial)
    assert not nothing and read == read_there == 3 * (8 + 8)
    for (_, ours), (_, alone) in zip(found, expected, strict=True):
        # Measured: below 5e-7, a rounding or two of fp32.
        torch.testing.assert_close(ours, alone[own], rtol=5e-7, atol=0)


@pytest.mark.parametrize("address", NAMES)
def test_names_that_programs_import_are_found(address: str) -> None:
    module = importlib.import_module(address)
    assert all(hasattr(module, name) for name in NAMES[address].split())


def test_the_first_models_are_named_after_importing_the_shell_alone() -> None:
    """v0.9's T5 and server scripts write no more than `import megatron`; no tool waits for torch because of that."""
    script = "import sys, megatron, megatron.training; print(megatron.legacy.model.T5Model, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "<class 'megatron.legacy.model.T5Model'> False\n", done.stderr


@pytest.mark.parametrize("name", ["GPTModel", "BertModel", "T5Model"])
def test_models_of_the_first_generation_are_refused_by_name(name: str) -> None:
    model = getattr(importlib.import_module("megatron.legacy.model"), name)
    with pytest.raises(FlagError, match=f"--use-legacy-models.*{name}"):
        model(None, num_tokentypes=0, parallel_output=True)


@pytest.mark.parametrize("use_te", [False, True])
def test_layers_of_ones_own_take_our_mlps(use_te: bool) -> None:
    """By position or name; where no Transformer Engine can run, both are of this library's modules."""
    dense = _get_mlp_module_spec(use_te)
    assert dense.module is MLP and dense.submodules.linear_fc1 is ColumnParallelLinear
    experts = _get_mlp_module_spec(use_te=use_te, num_experts=4, moe_grouped_gemm=False, fp8=None)
    assert experts.module is MoELayer and experts.submodules.linear_fc2 is RowParallelLinear
    assert _get_mlp_module_spec(use_te, 4, True).submodules is None


def test_modules_are_those_of_today() -> None:
    """Programs unwrap models by class, and name the parameters of other ranks by function."""
    older, newer = (
        importlib.import_module(address)
        for address in ("megatron.legacy.model.module", "megatron.core.transformer.module")
    )
    assert older.Float16Module is newer.Float16Module
    assert older.param_is_not_shared is newer.param_is_not_shared
