"""`--config-logger-dir` writes what the main objects were built with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.core.config_logger import (
    get_config_logger_path,
    has_config_logger_enabled,
    log_config_to_disk,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.gang.harness import run_gang
from tests.runs.pretraining import run_script

ARGV = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8 "
    "--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --train-iters 1 --eval-iters 0 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 30 --make-vocab-size-divisible-by 32 --distributed-backend gloo "
    "--transformer-impl local --num-workers 0 --config-logger-dir "
)


def test_a_run_records_model_wrapper_and_optimizer(tmp_path: Path) -> None:
    run_gang(1, run_script, [*ARGV.split(), str(tmp_path)])
    names = {"GPTModel", "DistributedDataParallel", "get_megatron_optimizer"}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.rank_0_0_0_0_0.iter0.json" for name in names
    }
    model = json.loads((tmp_path / "GPTModel.rank_0_0_0_0_0.iter0.json").read_text())
    assert model["vocab_size"] == 32 and model["max_sequence_length"] == 8 and model["rope_scaling"] is None
    assert model["config"]["hidden_size"] == 16 and model["config"]["params_dtype"] == "torch.float32"
    assert model["config"]["activation_func"].endswith("gelu")
    assert model["transformer_layer_spec"]["module"].endswith("TransformerLayer")


def test_it_is_off_by_default() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    assert not has_config_logger_enabled(config) and get_config_logger_path(config) == ""
    with pytest.raises(ValueError, match="config_logger_dir"):
        log_config_to_disk(config, {})
