"""examples/mamba: the full-size script is the documented one and valid for its machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.training.config import rules
from megatron.training.explain import describe, explain
from tests.runs.test_examples import launched, validated

PUBLISHED = (
    "num_query_groups=8 hybrid_attention_ratio=0.08 hybrid_mlp_ratio=0.5 seq_length=4096 max_position_embeddings=4096 "
    "position_embedding_type=none untie_embeddings_and_output_weights=True normalization=RMSNorm add_bias_linear=False "
    "init_method_std=0.02 attention_dropout=0.0 hidden_dropout=0.0 micro_batch_size=4 train_samples=73242188 "
    "lr_warmup_samples=50000 lr_decay_samples=73192188 lr=0.00025 min_lr=2.5e-05 lr_decay_style=cosine weight_decay=0.1 "
    "clip_grad=1.0 adam_beta1=0.9 adam_beta2=0.95 bf16=True use_distributed_optimizer=True overlap_param_gather=True "
    "overlap_grad_reduce=True split=99,1,0 tokenizer_type=GPTSentencePieceTokenizer tokenizer_model=TOK log_interval=10 "
    "save_interval=2000 eval_interval=2000 eval_iters=32 create_attention_mask_in_dataloader=False"
)
SCALES = {
    "800M": "tensor_model_parallel_size=1 num_layers=48 hidden_size=1024 num_attention_heads=16 global_batch_size=32",
    "8B": "tensor_model_parallel_size=4 num_layers=56 hidden_size=4096 num_attention_heads=32 global_batch_size=8 "
    "sequence_parallel=True",
}


@pytest.mark.parametrize("scale", SCALES)
def test_documented_command_line_is_valid_for_its_machines(
    scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bash", "examples/mamba/train.sh", "D", "TOK"]
    options, entry, argv = launched(command, tmp_path, MODEL_SCALE=scale)
    assert entry == "pretrain_mamba.py"
    args = validated(options, entry, argv, monkeypatch)
    rules.check(args, rules.HYBRID)
    assert (args.world_size, args.data_path) == (8, ["D"])
    for claim in f"{PUBLISHED} {SCALES[scale]}".split():
        name, value = claim.split("=")
        assert str(getattr(args, name)) == value, name


@pytest.mark.parametrize(("scale", "size"), [("800M", "907,127,680"), ("8B", "8,654,517,248")])
def test_documented_command_line_is_explained(scale: str, size: str, tmp_path: Path) -> None:
    """With the published vocabulary, whose two tables are large beside the smaller model; it fits its machine."""
    command = ["bash", "examples/mamba/train.sh", "D", "TOK"]
    options, entry, argv = launched(command, tmp_path, MODEL_SCALE=scale)
    launcher = [word for option in options.items() for word in option]
    words = ["torchrun", *launcher, entry, *argv, "--vocab-size", "256000", "--device", "h100"]
    text = "\n".join(describe.lines(explain(words)))
    assert f"> model: {size} parameters" in text and "> predicted step on h100: " in text
    assert "will not start" not in text and "does not fit" not in text
