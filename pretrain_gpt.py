"""Pretrain a GPT: `torchrun --nproc-per-node N pretrain_gpt.py <flags>`; plain `python pretrain_gpt.py` is one rank.

What makes this a GPT run is here: the model, the data, the batch, the loss. The loop is in megatron/training/training.py.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.rotary_pos_embedding import FrequencyScaling
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.straggler import StragglerDetector
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training import get_args, get_timers, get_tokenizer, pretrain
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.batch import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank, makes_attention_mask
from megatron.training.cli import run_main
from megatron.training.config import rules
from megatron.training.datasets import build_splits, source_fields
from megatron.training.losses import masked_token_loss as loss_func
from megatron.training.specs import named_spec
from megatron.training.utils import print_rank_0


def model_provider(pre_process: bool = True, post_process: bool = True) -> GPTModel:
    """The layers of this pipeline stage; with the embedding if `pre_process`, with the output layer if `post_process`."""
    args = get_args()
    rules.check(args, rules.GPT)
    print_rank_0("building GPT model ...")
    config = core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(args),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        rope_scaling=FrequencyScaling(factor=args.rope_scaling_factor) if args.use_rope_scaling else None,
    )


def layer_spec(args: Namespace) -> ModuleSpec:
    """What a layer is made of: `--spec MODULE NAME`, else by `--transformer-impl`."""
    if args.spec is not None:
        return named_spec(args.spec)
    if args.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(
            args.num_experts, args.moe_grouped_gemm, args.qk_layernorm, args.fp8
        )
    return get_gpt_layer_local_spec(args.num_experts, args.moe_grouped_gemm, args.qk_layernorm)


def get_batch(data_iterator: Iterator[dict[str, Tensor]]) -> tuple[Tensor | None, ...]:
    """tokens, labels, loss_mask, attention_mask, position_ids of this rank; all None on stages that need none."""
    if not stage_reads_data():
        return (None,) * 5
    batch = get_batch_on_this_cp_rank(get_batch_on_this_tp_rank(data_iterator))
    return tuple(batch[key] for key in ("tokens", "labels", "loss_mask", "attention_mask", "position_ids"))


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]], model: GPTModel
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """One micro-batch: loss per token [b, s/cp] on the last stage, hidden states [s/cp/sp, b, h] before it."""
    timers, stragglers = get_timers(), StragglerDetector()
    timers("batch-generator", log_level=2).start()
    with stragglers(bdata=True):
        tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator)
    timers("batch-generator").stop()
    with stragglers:
        output = model(tokens, position_ids, attention_mask, labels=labels)
    return output, partial(loss_func, loss_mask)


def stage_reads_data() -> bool:
    """The first and last pipeline stage read data; all do where masks depend on it."""
    ends = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    return ends or makes_attention_mask(get_args())


def is_dataset_built_on_rank() -> bool:
    """Ranks that read data: the first of each tensor-parallel group, on the stages that read any."""
    return stage_reads_data() and parallel_state.get_tensor_model_parallel_rank() == 0


def core_gpt_dataset_config_from_args(args: Namespace) -> GPTDatasetConfig:
    """Where samples come from, and how documents are cut into them."""
    return GPTDatasetConfig(
        sequence_length=args.seq_length,
        **source_fields(args, get_tokenizer()),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        # A causal mask needs no tensor: attention looks left by itself.
        create_attention_mask=makes_attention_mask(args) and args.create_attention_mask_in_dataloader,
        s3_cache_path=args.s3_cache_path,
    )


def train_valid_test_datasets_provider(train_val_test_num_samples: tuple[int, int, int]) -> list[Any]:
    """Train, validation and test datasets with at least these many samples."""
    args = get_args()
    config = core_gpt_dataset_config_from_args(args)
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return build_splits("GPT", dataset, train_val_test_num_samples, is_dataset_built_on_rank, config)


def run() -> None:
    """Pretrain as the command line says."""
    train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        model_name="GPT",
    )


def main() -> None:
    """Entry point of `pretrain-gpt`."""
    run_main(run)


if __name__ == "__main__":
    main()
