"""Examples of inference: the batch script says what other programs say, and the servers' command lines are valid."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron.core.errors import FlagError
from megatron.core.kernels import capability
from megatron.inference.arguments import GENERATION, SERVING, add_server_arguments
from megatron.training import arguments
from megatron.training.config import build, rules
from tests.gang.harness import run_gang
from tests.runs.pretraining import run_script
from tests.runs.test_examples import CLUSTER, launched
from tests.runs.test_generate_text import MODEL, TRAINING, continue_prompts

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH_SCRIPT = REPOSITORY / "examples/inference/gpt/simple_gpt_batch_inference.py"


def complete(argv: list[str]) -> list[dict[str, Any]] | str:
    """Body: what the batch script prints of each request, or why it refuses."""
    specification = importlib.util.spec_from_file_location("simple_gpt_batch_inference", BATCH_SCRIPT)
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", [str(BATCH_SCRIPT), *argv]), contextlib.redirect_stdout(printed):
        try:
            script.main()
        except FlagError as error:
            return str(error)
    lines = printed.getvalue().splitlines()
    headers = [at for at, line in enumerate(lines) if line.startswith("------------- RESULT FOR PROMPT ")]
    assert [lines[at] for at in headers] == [
        f"------------- RESULT FOR PROMPT {number} --------------- " for number in range(len(headers))
    ]
    assert all(lines[at - 1] == "" for at in headers)
    return [ast.literal_eval(lines[at + 1]) for at in headers]


def test_batches_are_completed_as_prompts_alone_are(tmp_path: Path) -> None:
    run_gang(1, run_script, [*(MODEL + TRAINING).split(), "--save", str(tmp_path)])
    argv = [*MODEL.split(), "--load", str(tmp_path)]
    prompts = ["5 6 7", "9 10 11 12 13", "20"]
    expected = []
    for prompt in prompts:
        options = ["--prompt", prompt, "--out-seq-length", "6", "--top-k", "1"]
        expected += run_gang(1, continue_prompts, [*argv, *options])[0]
    wanted = ["--num-tokens-to-generate", "6", "--max-batch-size", "2", "--return-log-probs"]
    layout = ["--tensor-model-parallel-size", "2"]
    results, others = run_gang(2, complete, [*argv, *wanted, *layout, "--prompts", *prompts])
    assert others == []
    for number, (result, prompt, text) in enumerate(zip(results, prompts, expected, strict=True)):
        assert list(result)[:4] == ["id", "input_prompt", "generated_text", "generated_tokens"]
        assert (result["id"], result["input_prompt"]) == (str(number), prompt)
        assert f"{prompt} {result['generated_text']}" == text
        assert " ".join(map(str, result["generated_tokens"])) == result["generated_text"]
        assert len(result["generated_log_probs"]) == 6
    for words, flag in ((["--prompts", "hello"], "--prompts"), ([], "--prompts"), (["--load", ""], "--load")):
        (refusal,) = run_gang(1, complete, [*argv, *words])
        assert refusal.startswith(flag)


_345M = (
    "num_layers=24 hidden_size=1024 num_attention_heads=16 max_position_embeddings=1024 seq_length=1024 fp16=True "
    "tokenizer_type=GPT2BPETokenizer micro_batch_size=1 vocab_file=V merge_file=M load=C seed=42 "
    "pipeline_model_parallel_size=1"
)
_8B = (
    "use_checkpoint_args=True add_bias_linear=False tokenizer_type=HuggingFaceTokenizer tokenizer_model=T load=C "
    "transformer_impl=transformer_engine normalization=RMSNorm group_query_attention=True num_query_groups=8 "
    "masked_softmax_fusion=False attention_softmax_in_fp32=True attention_dropout=0.0 hidden_dropout=0.0 "
    "untie_embeddings_and_output_weights=True position_embedding_type=rope rotary_percent=1.0 swiglu=True "
    "tensor_model_parallel_size=1 pipeline_model_parallel_size=1 num_layers=32 hidden_size=4096 ffn_hidden_size=14336 "
    "num_attention_heads=32 bf16=True micro_batch_size=1"
)
ENVIRONMENT = {"CHECKPOINT": "C", "VOCAB_FILE": "V", "MERGE_FILE": "M"}
# script: (positional arguments, environment, ranks, what v0.9's documentation says of it)
SERVERS = {
    "run_text_generation_server_345M.sh": ([], ENVIRONMENT, 1, f"{_345M} tensor_model_parallel_size=1"),
    "run_text_generation_server_345M_8_tensor_parallel.sh": (
        [], ENVIRONMENT, 8, f"{_345M} tensor_model_parallel_size=8",
    ),
    "llama_mistral/run_text_generation_llama3.sh": (
        ["C", "T"], {}, 1, f"{_8B} rotary_base=500000 max_position_embeddings=8192 seq_length=8192",
    ),
    "llama_mistral/run_text_generation_mistral.sh": (
        ["C", "T"], {}, 1,
        f"{_8B} rotary_base=1000000 max_position_embeddings=4096 seq_length=4096 seed=101 apply_layernorm_1p=True "
        "use_flash_attn=True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("script", SERVERS)
def test_documented_server_is_valid_for_its_machine(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    positional, environment, ranks, documented = SERVERS[script]
    command = ["bash", f"examples/inference/{script}", *positional, "--port", "5001"]
    options, entry, argv = launched(command, tmp_path, **environment)
    assert entry == "tools/run_text_generation_server.py" and options["--nproc_per_node"] == str(ranks)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with capability.pretend(CLUSTER):
        args = arguments.parse_args(add_server_arguments, argv=argv)
        args = arguments.validate_args(args, {})
        build.configs(args)
        rules.check(args, [*GENERATION, *SERVING])
    assert args.port == 5001
    for claim in documented.split():
        name, value = claim.split("=")
        assert str(getattr(args, name)) == value, name
