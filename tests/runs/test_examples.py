"""Example scripts: their command lines are the documented ones and valid for their machines; their laptop twins learn."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from megatron.core.errors import FlagError
from megatron.core.kernels import capability
from megatron.training import arguments
from megatron.training.config import build, rules
from megatron.training.explain import describe, explain

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = capability.Capabilities(
    compute=(9, 0), device_name="H100", torch_version="2.13.0", packages={"transformer_engine": "1.11"}
)
#: Stands in for torchrun (and srun runs its command): writes down its arguments.
RECORDER = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "w") as file:
    json.dump(sys.argv[1:], file)
"""


def launched(command: list[str], tmp_path: Path, **environment: str) -> tuple[dict[str, str], str, list[str]]:
    """What a command gives to torchrun: launcher options, script, the script's arguments."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "torchrun").write_text(RECORDER.format(python=sys.executable))
    (tools / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do [[ $1 == *=* ]] || shift; shift; done\nexec "$@"\n'
    )
    (tools / "scontrol").write_text("#!/bin/bash\nprintf 'node1\\nnode2\\n'\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    record = tmp_path / "record.json"
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={"PATH": path, "RECORD": str(record), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    words = json.loads(record.read_text())
    at = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return dict(zip(words[0:at:2], words[1:at:2])), words[at], words[at + 1 :]


def validated(
    options: dict[str, str], script: str, argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> Namespace:
    """The arguments of one rank of the world the launcher would make, on GPUs with Transformer Engine."""
    world = int(options["--nproc_per_node"]) * int(options["--nnodes"])
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", "1")  # only rank 0 prints
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    defaults = "GPT2BPETokenizer" if script == "pretrain_gpt.py" else "BertWordPieceLowerCase"
    with capability.pretend(CLUSTER):
        args = arguments.validate_args(arguments.parse_args(argv=argv), {"tokenizer_type": defaults})
        arguments.validate_for_training(args)
        build.configs(args)
        rules.check(args, {"pretrain_bert.py": rules.BERT, "pretrain_t5.py": rules.T5}.get(script, []))
    return args


FOUR, FIVE = ["C", "T", "V", "D"], ["C", "T", "V", "M", "D"]
ENVIRONMENT = {"CHECKPOINT_PATH": "C", "VOCAB_FILE": "V", "MERGE_FILE": "M", "DATA_PATH": "D"}
# script: (positional arguments, environment, ranks, data-parallel size, what v0.9's documentation says of it)
DOCUMENTED = {
    "bert/train_bert_340m_distributed.sh": (
        FOUR, {}, 128, 1,
        "num_layers=24 hidden_size=1024 num_attention_heads=16 seq_length=512 max_position_embeddings=512 "
        "micro_batch_size=4 global_batch_size=32 train_iters=1000000 weight_decay=0.01 clip_grad=1.0 fp16=True lr=0.0001 "
        "lr_decay_iters=990000 lr_decay_style=linear min_lr=1e-05 lr_warmup_fraction=0.01 tensor_model_parallel_size=8 "
        "pipeline_model_parallel_size=16 split=949,50,1 vocab_file=V log_interval=100 save_interval=10000 "
        "eval_interval=1000 eval_iters=10 save=C load=C tensorboard_dir=T tokenizer_type=BertWordPieceLowerCase",
    ),
    "t5/train_t5_220m_distributed.sh": (
        FOUR, {}, 8, 8,
        "encoder_num_layers=12 decoder_num_layers=12 hidden_size=768 num_attention_heads=12 kv_channels=64 "
        "ffn_hidden_size=3072 encoder_seq_length=512 decoder_seq_length=128 max_position_embeddings=512 micro_batch_size=64 "
        "global_batch_size=512 lr=0.0001 train_iters=1000000 lr_decay_iters=1000000 lr_decay_style=linear min_lr=1e-05 "
        "weight_decay=0.01 lr_warmup_fraction=0.01 clip_grad=1.0 bf16=True vocab_extra_ids=100 init_method_std=0.015 "
        "transformer_impl=transformer_engine tensor_model_parallel_size=1 pipeline_model_parallel_size=1 "
        "tokenizer_type=BertWordPieceCase split=99982,9,9 log_interval=100 save_interval=500 eval_interval=1000 "
        "eval_iters=10 distributed_backend=nccl save=C load=C tensorboard_dir=T",
    ),
    "gpt3/train_gpt3_175b_distributed.sh": (
        FIVE, {}, 1024, 8,
        "num_layers=96 hidden_size=12288 num_attention_heads=96 seq_length=2048 max_position_embeddings=2048 "
        "micro_batch_size=1 global_batch_size=1536 rampup_batch_size=['16','16','5859375'] train_samples=768000000 "
        "lr_decay_samples=660480000 weight_decay=0.1 adam_beta1=0.9 adam_beta2=0.95 init_method_std=0.006 clip_grad=1.0 "
        "fp16=True lr=6e-05 lr_decay_style=cosine min_lr=6e-06 lr_warmup_fraction=0.001 tensor_model_parallel_size=8 "
        "pipeline_model_parallel_size=16 split=949,50,1 vocab_file=V merge_file=M log_interval=100 save_interval=10000 "
        "eval_interval=1000 eval_iters=10 save=C load=C tensorboard_dir=T tokenizer_type=GPT2BPETokenizer",
    ),
    "llama/train_llama_8b_distributed.sh": (
        FOUR, {}, 16, 8, "swiglu=True normalization=RMSNorm num_query_groups=8 use_distributed_optimizer=True bf16=True",
    ),
    "pretrain_gpt_distributed_with_mp.sh": (
        [], ENVIRONMENT, 8, 2,
        "tensor_model_parallel_size=2 pipeline_model_parallel_size=2 sequence_parallel=True merge_file=M",
    ),
    "pretrain_bert_distributed_with_mp.sh": (
        [], ENVIRONMENT, 8, 2, "tensor_model_parallel_size=2 pipeline_model_parallel_size=2 num_layers=24",
    ),
    "pretrain_t5_distributed_with_mp.sh": (
        [], ENVIRONMENT, 8, 2,
        "tensor_model_parallel_size=2 encoder_pipeline_model_parallel_size=1 pipeline_model_parallel_size=1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("script", DOCUMENTED)
def test_documented_command_line_is_valid_for_its_machines(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    positional, environment, ranks, data_parallel, documented = DOCUMENTED[script]
    options, entry, argv = launched(["bash", f"examples/{script}", *positional], tmp_path, **environment)
    args = validated(options, entry, argv, monkeypatch)
    assert (args.world_size, args.data_parallel_size, args.data_path) == (ranks, data_parallel, ["D"])
    with capability.pretend(CLUSTER):
        assert not [line for line in arguments.notices(args) if "no effect" in line]
    for claim in documented.split():
        name, value = claim.split("=")
        assert str(getattr(args, name)).replace(" ", "") == value, name


@pytest.mark.parametrize("script", DOCUMENTED)
def test_documented_command_line_is_explained(script: str, tmp_path: Path) -> None:
    """What the script gives to torchrun, given to tools/explain.py: the layout of its machines and what a rank holds."""
    positional, environment, ranks, data_parallel, _ = DOCUMENTED[script]
    options, entry, argv = launched(["bash", f"examples/{script}", *positional], tmp_path, **environment)
    launcher = [word for option in options.items() for word in option]
    no_files = ["--vocab-size", "128256"] if "llama" in script else []
    words = ["torchrun", *launcher, entry, *argv, *no_files, "--device", "h100"]
    text = "\n".join(describe.lines(explain(words)))
    assert f"> layout: {ranks} rank(s) on H100 = tensor " in text and f" x data {data_parallel}\n" in text
    assert "will not start" not in text and "> predicted step on h100: " in text


def test_every_training_script_is_documented_here() -> None:
    scripts = {
        str(p.relative_to(REPOSITORY / "examples"))
        for p in (REPOSITORY / "examples").rglob("*distributed*.sh")
    }
    assert scripts == set(DOCUMENTED)


def test_published_ramp_up_with_iterations_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What v0.9's own example says about its length, which is why ours counts samples."""
    command = ["bash", "examples/gpt3/train_gpt3_175b_distributed.sh", *FIVE, "--train-iters", "500000"]
    with pytest.raises(FlagError, match=r"--rampup-batch-size|--train-samples"):
        validated(*launched(command, tmp_path), monkeypatch)


@pytest.mark.parametrize("missing", ["CHECKPOINT_PATH", "DATA_PATH", "VOCAB_FILE"])
def test_missing_path_is_named(missing: str) -> None:
    environment = {**ENVIRONMENT, "PATH": os.environ["PATH"], "TENSORBOARD_LOGS_PATH": "T"}
    del environment[missing]
    result = subprocess.run(
        ["bash", "examples/bert/train_bert_340m_distributed.sh"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0 and missing in result.stderr


def test_slurm_job_runs_the_script_on_each_node(tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_NUM_NODES": "128", "SLURM_JOB_NODELIST": "node[1-128]", "SLURM_NODEID": "5"}
    script = "examples/gpt3/train_gpt3_175b_distributed.sh"
    plain = launched(["bash", script, *FIVE], tmp_path)
    for image in ({}, {"CONTAINER_IMAGE": "image", "CONTAINER_MOUNTS": "/data:/data"}):
        options, entry, argv = launched(
            ["bash", "examples/slurm/pretrain.sbatch", script, *FIVE], tmp_path, **slurm, **image
        )
        assert (
            options["--node_rank"] == "5"
            and options["--nnodes"] == "128"
            and options["--master_addr"] == "node1"
        )
        assert (entry, argv) == plain[1:]


def test_cloud_examples_run_the_script(tmp_path: Path) -> None:
    script = "examples/llama/train_llama_8b_distributed.sh"
    paths = ["/data/checkpoints", "/data/tensorboard", "/data/tokenizer", "/data/corpus_text_document"]
    plain = launched(["bash", script, *paths], tmp_path)

    task = yaml.safe_load((REPOSITORY / "examples/skypilot/train.yaml").read_text())
    sky = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "a\nb",
    }
    options, *command = launched(["bash", "-c", task["run"]], tmp_path, **sky, **task["envs"])
    assert tuple(command) == plain[1:] and task["num_nodes"] == 2
    assert (options["--node_rank"], options["--nnodes"], options["--master_addr"]) == ("1", "2", "a")

    job = yaml.safe_load((REPOSITORY / "examples/kubernetes/pytorchjob.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sum(replica["replicas"] for replica in replicas.values()) == 2
    for rank, replica in enumerate(replicas.values()):
        [pod] = replica["template"]["spec"]["containers"]
        operator = {"RANK": str(rank), "MASTER_ADDR": "master", "MASTER_PORT": "23456"}
        options, *command = launched([*pod["command"], *pod["args"]], tmp_path, **operator)
        assert tuple(command) == plain[1:]
        assert (options["--node_rank"], options["--nnodes"], options["--master_addr"]) == (
            str(rank),
            "2",
            "master",
        )


#: Fewer steps than the twins take by themselves.
SHORTER = "--train-iters 40 --eval-iters 1"
# twin: (what the loss starts above, about the logarithm of the vocabulary; what it must fall below; flags added)
TWINS = {
    "bert": (6.8, 6.4, SHORTER),
    "t5": (6.8, 6.0, SHORTER),
    "gpt3": (6.9, 6.6, "--eval-iters 1"),
    "llama": (7.0, 6.4, SHORTER),
    "mamba": (6.8, 6.4, "--train-iters 20 --eval-iters 1"),
}


@pytest.fixture(scope="module")
def token_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twins of one kind share their corpus and vocabulary here."""
    return tmp_path_factory.mktemp("twins")


@pytest.mark.parametrize("twin", TWINS)
def test_laptop_twin_learns(twin: str, token_files: Path) -> None:
    above, below, more = TWINS[twin]
    port = str(20000 + os.getpid() % 10000)
    result = subprocess.run(
        ["bash", f"examples/{twin}/laptop.sh", *more.split()],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "RUN_DIR": str(token_files),
            "PYTHON": sys.executable,
            "MASTER_PORT": port,
            "MEGABYTES": "0.7",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    losses = [float(value) for value in re.findall(r"\| lm loss: (\S+)", result.stdout)]
    assert losses[0] > above and losses[-1] < below, losses
    assert "successfully saved checkpoint" in result.stdout
