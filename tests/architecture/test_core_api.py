"""What users' code imports from v0.9 is here under the same name and takes the same arguments.

`tests/golden/core_api.tsv` lists v0.9's public names (module, name, kind, signature without self). A call that v0.9 accepted
must mean the same here; further parameters are allowed if they are optional.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import enum
import fnmatch
import importlib
import inspect
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "core_api.tsv"
_INTERNAL = "an internal helper of v0.9's implementation"
_TYPING = "a name that v0.9's module imports for itself"

#: `module:name` patterns of what is missing or different on purpose, and why.
EXCEPTIONS = {
    "megatron.core.ssm.triton_cache_manager:*": "state-space layers have no Triton kernels to cache",
    "megatron.core.transformer.cuda_graphs:*": "layers are recorded by one function, record_layers",
    "megatron.core.extensions.transformer_engine:*": "it cannot be imported without Transformer Engine",
    "megatron.core.inference.modelopt_support.*": "it needs a package for quantisation",
    "megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper:*.get_batch_for_context_window":
        "v0.9's abstract method lacks the parameters that its callers pass",
    "megatron.core.datasets.blended_megatron_dataset_builder:*": "the record lacks the first parameter, cls",
    "megatron.core.dist_checkpointing.strategies.zarr:ZarrSaveShardedStrategy*": "v0.9 deprecates it; it is only read",
    "megatron.core.dist_checkpointing.strategies.zarr:postprocess_numpy_array": _INTERNAL,
    "megatron.core.dist_checkpointing.strategies.zarr:flatten_range": _INTERNAL,
    "megatron.core.dist_checkpointing.strategies.zarr:pad_to_expected_shape": _INTERNAL,
    "megatron.core.dist_checkpointing.strategies.zarr:load_zarr_based_sharded_metadata": _INTERNAL,
    "megatron.core.dist_checkpointing.strategies.tensorstore:*": "needs a package that no platform of ours has",
    "megatron.core.dist_checkpointing.strategies.two_stage:*": "v0.9 deprecates it",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver:*": _INTERNAL,
    "megatron.core.dist_checkpointing.strategies.filesystem_async:*": _INTERNAL,
    "megatron.core.dist_checkpointing.strategies.resharding:*": _INTERNAL,
    "megatron.core.dist_checkpointing.strategies.torch:*": _INTERNAL,
    "megatron.core.dist_checkpointing.strategies:register_default_common_strategies": _INTERNAL,
    "megatron.core.dist_checkpointing.strategies.base:*Common*": "objects are stored with tensors, not apart",
    "megatron.core.dist_checkpointing.strategies.base:LoadStrategyBase.check_backend_compatibility": _INTERNAL,
    "megatron.core.dist_checkpointing.strategies.common:*": "objects are stored with tensors, not apart",
    "megatron.core.dist_checkpointing.exchange_utils:*": _INTERNAL,
    "megatron.core.dist_checkpointing.state_dict_transformation:*": _INTERNAL,
    "megatron.core.dist_checkpointing.core:CheckpointingException": "an error names its subject, reason and fix",
    "megatron.core.optimizer:Callable": _TYPING,
    "megatron.core.optimizer:Dict": _TYPING,
    "megatron.core.optimizer:List": _TYPING,
    "megatron.core.optimizer:Optional": _TYPING,
    "megatron.core.optimizer:Tuple": _TYPING,
    "megatron.core.optimizer:mpu": _TYPING,
    "megatron.core.optimizer:_ParamAndGradBuffer": _TYPING,
    "megatron.core.optimizer:MegatronModule": _TYPING,
    "megatron.core.optimizer:log_single_rank": _TYPING,
    "megatron.core.transformer.moe.experts:TEGroupedMLP*": "grouped experts have one class for all kernels",
    "megatron.core.transformer.moe.moe_utils:moe_*": _INTERNAL,
    "megatron.core.transformer.moe.token_dispatcher:MoETokenDispatcher.token_*permutation":
        "v0.9's base class declares other parameters than its own subclasses take",
    "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.preprocess": _INTERNAL,
    "megatron.core.transformer.torch_layer_norm:WrappedTorchLayerNorm": "without a kind it takes the configuration's",
    "megatron.training.arguments:load_retro_*": "Retro is not part of this project",
    "megatron.training.checkpointing:*_checkpoint_version": "the version travels with the checkpoint, not in a global",
    "megatron.training.checkpointing:fix_*": _INTERNAL,
    "megatron.training.checkpointing:load_biencoder_checkpoint": "biencoders are not part of this project",
    "megatron.training.ft_integration:*": "cluster services are not part of this project",
    "megatron.training.log_handler:*": _INTERNAL,
    "megatron.training.one_logger_utils:*": "cluster services are not part of this project",
    "megatron.training.tokenizer.bert_tokenization:*": "tokenizers are built by build_tokenizer and share one interface",
    "megatron.training.tokenizer.gpt2_tokenization:*": "tokenizers are built by build_tokenizer and share one interface",
    "megatron.training.training:compute_throughputs_and_append_to_progress_log": _INTERNAL,
    "megatron.training.training:save_checkpoint_and_time": _INTERNAL,
    "megatron.training.training:cyclic_iter": "its parameter does not hide a builtin",
    "megatron.training.training:build_train_valid_test_*": "the provider's parameter is called `provider`",
    "megatron.training.utils:print_params_min_max_norm": _INTERNAL,
    "megatron.training.utils:check_adlr_autoresume_termination": "cluster services are not part of this project",
    "megatron.training.yaml_arguments:*": "a YAML file fills the same arguments as the command line",
}  # fmt: skip


def recorded() -> list[dict[str, str]]:
    with GOLDEN.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def cases() -> dict[str, list[tuple[str, dict[str, str]]]]:
    """For each module of v0.9, the names that must be there."""
    result: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for row in recorded():
        for name in row["name"].split(", "):
            if not any(fnmatch.fnmatchcase(f"{row['module']}:{name}", pattern) for pattern in EXCEPTIONS):
                result.setdefault(row["module"], []).append((name, row))
    return result


CASES = cases()


def find(module: Any, name: str) -> tuple[Any, bool]:
    """The object of a dotted name, and whether calls of it get a first argument (self or cls) by themselves."""
    owner, found = None, module
    for part in name.split("."):
        owner, found = found, getattr(found, part)
    if not inspect.isclass(owner):
        return found, False
    raw = inspect.getattr_static(owner, name.rpartition(".")[2])
    if isinstance(raw, (staticmethod, classmethod)):
        return raw.__func__, isinstance(raw, classmethod)
    return raw, True


def expected_arguments(signature: str) -> ast.arguments:
    return ast.parse(f"def f{signature.replace('…', '...')}: pass").body[0].args  # type: ignore[attr-defined]


def expected_parameters(signature: str) -> list[tuple[str, ast.expr | None]]:
    """Names and defaults of a recorded signature's positional parameters; None where a value is required."""
    arguments = expected_arguments(signature)
    names = [arg.arg for arg in arguments.posonlyargs + arguments.args]
    missing = len(names) - len(arguments.defaults)
    return list(zip(names, [None] * missing + list(arguments.defaults)))


def same_default(recorded: ast.expr, ours: Any, names: dict[str, Any]) -> bool:
    """Whether a default has the recorded value. Functions are not compared; None stands for an empty dict.

    `names` are those of our module; one that v0.9's module has and ours lacks is a constant of its own.
    """
    if isinstance(recorded, (ast.Lambda, ast.Call)):
        return True
    if isinstance(recorded, ast.Dict) and ours is None:
        return True
    known = {"torch": torch, "F": torch.nn.functional, "signal": signal, **names}
    if isinstance(recorded, ast.Name) and recorded.id not in known:
        return True
    return bool(eval(compile(ast.Expression(recorded), "default", "eval"), known) == ours)


def call_problems(function: Any, bound: bool, signature: str, names: dict[str, Any]) -> list[str]:
    """How calls that v0.9 accepts would fail or mean something else."""
    if expected_arguments(signature).vararg:
        return []
    parameters = list(inspect.signature(function).parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][bound:]
    problems = []
    wanted = expected_parameters(signature)
    for index, (name, default) in enumerate(wanted):
        if index >= len(positional):
            if inspect.Parameter.VAR_POSITIONAL not in kinds:
                problems.append(f"takes no {name}")
            continue
        ours = positional[index]
        if ours.name != name:
            problems.append(f"parameter {index} is {ours.name}, not {name}")
        elif default is not None and ours.default is inspect.Parameter.empty:
            problems.append(f"{name} is required")
        elif default is not None and not same_default(default, ours.default, names):
            problems.append(f"{name} defaults to {ours.default!r}, not {ast.unparse(default)}")
    extra = positional[len(wanted) :] + [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    keywords = {arg.arg for arg in expected_arguments(signature).kwonlyargs}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        problems += [f"takes no {name}" for name in sorted(keywords - {p.name for p in parameters})]
    named = keywords | {name for name, _ in wanted}
    problems += [f"{p.name} is required" for p in extra if p.default is p.empty and p.name not in named]
    return problems


def field_problems(record: type, signature: str, names: dict[str, Any]) -> list[str]:
    """Fields (v0.9 lists a class's own, without its bases') that are missing, elsewhere in the order, or start otherwise."""
    fields = {field.name: field for field in dataclasses.fields(record)}
    wanted = expected_parameters(signature)
    problems = [f"has no field {name}" for name, _ in wanted if name not in fields]
    order = [name for name in fields if name in dict(wanted)]
    if order != [name for name, _ in wanted if name in fields]:
        problems.append(f"fields come in the order {order}")
    for name, default in wanted:
        constant = default is not None and not isinstance(default, ast.Call)
        if name in fields and constant and ast.unparse(default) != "...":
            ours = fields[name].default
            if ours is not dataclasses.MISSING and not same_default(default, ours, names):
                problems.append(f"{name} starts as {ours!r}, not {ast.unparse(default)}")
    return problems


def member_problems(members: type[enum.Enum], signature: str) -> list[str]:
    """Members that are missing or have another value."""
    problems = []
    for name, value in expected_parameters(signature):
        if name not in members.__members__:
            problems.append(f"has no member {name}")
        elif isinstance(value, ast.Constant) and value.value not in (..., members[name].value):
            problems.append(f"{name} is {members[name].value!r}, not {ast.unparse(value)}")
    return problems


def problems(module: Any, name: str, row: dict[str, str]) -> list[str]:
    """What users of this name would notice."""
    try:
        found, bound = find(module, name)
    except AttributeError:
        return ["is missing"]
    kind = row["kind"]
    if kind.startswith("re-export") or not row["signature"] or isinstance(found, property):
        return []
    if kind.startswith("dataclass"):
        return field_problems(found, row["signature"], vars(module))
    if kind.startswith("enum"):
        return member_problems(found, row["signature"])
    if kind.startswith("class") and row["signature"] == "()":
        return [] if inspect.isclass(found) else ["is no class"]
    if kind == "property":
        return ["is no property"]
    return call_problems(found, bound, row["signature"], vars(module))


@pytest.mark.parametrize("module", CASES)
def test_names_resolve_and_take_the_same_arguments(module: str) -> None:
    imported = importlib.import_module(module)
    found = {name: problems(imported, name, row) for name, row in CASES[module]}
    assert not {name: what for name, what in found.items() if what}


def test_most_of_the_interface_is_here() -> None:
    """The table of exceptions is for details: what users write against is all there."""
    assert sum(map(len, CASES.values())) > 850
    core = "parallel_state tensor_parallel.layers transformer.transformer_layer optimizer.optimizer timers utils distributed"
    assert {f"megatron.core.{name}" for name in core.split()} <= set(CASES)


def test_importing_the_library_needs_torch_and_numpy_alone() -> None:
    """No other package is imported, no device touched, no group created, and `megatron.core` itself loads nothing."""
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"transformer_engine", "apex", "flash_attn", "triton", "transformers", "tokenizers",
                "sentencepiece", "tiktoken", "tensorboard", "wandb", "yaml", "tqdm", "regex", "nltk", "grouped_gemm",
                "einops", "zarr", "tensorstore", "boto3", "botocore", "hypothesis", "pytest"}:
            raise ImportError(name)
import megatron.core
assert "torch" not in sys.modules, "import megatron.core loads torch"
import torch, numpy
sys.meta_path.insert(0, Refuse())
before = torch.get_rng_state()
assert megatron.core.utils.divide(4, 2) == 2 and megatron.core.mpu is megatron.core.parallel_state
assert not hasattr(megatron.core, "nonsense") and not hasattr(megatron.core, "_private")
from megatron.core import (
    DistributedDataParallel, InferenceParams, ModelParallelConfig, Timers, mpu, parallel_state, tensor_parallel,
)
from megatron.core import dist_checkpointing, models, num_microbatches_calculator, optimizer, pipeline_parallel, transformer
from megatron.core.datasets import gpt_dataset
from megatron.core.models.gpt import GPTModel
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.T5 import T5Model
from megatron.core.models.mamba import MambaModel
from megatron.core.optimizer import get_megatron_optimizer
assert mpu is parallel_state and not parallel_state.model_parallel_is_initialized()
assert torch.equal(before, torch.get_rng_state()) and not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_run_starts_without_what_takes_long_to_import() -> None:
    """The entry scripts leave torch's slow parts, and packages that few runs need, to those who use them."""
    script = """
import sys, torch
before = set(sys.modules)
import pretrain_gpt, pretrain_bert, pretrain_t5, pretrain_mamba
from megatron.training import training
slow = {"sympy", "torch.distributed.checkpoint", "torch.distributed.tensor", "torch._dynamo", "torch._inductor",
        "transformers", "tokenizers", "flask", "yaml", "tensorboard", "wandb"}
assert not slow & (set(sys.modules) - before), slow & (set(sys.modules) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
