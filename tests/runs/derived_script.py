"""An entry script as users derive theirs from v0.9's: every import, function and call that those have."""

from __future__ import annotations

from functools import partial
from typing import Any, Union

import torch
from torch import Tensor

import megatron.legacy.model
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import import_module
from megatron.core.utils import StragglerDetector
from megatron.training import get_args, get_timers, get_tokenizer, pretrain, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training.yaml_arguments import core_transformer_config_from_yaml

stimer = StragglerDetector()
#: What is done with (losses per token [b, s] of each micro-batch, iteration, TensorBoard's writer) after an evaluation.
process_collected: Any = None


def model_provider(
    pre_process: bool = True, post_process: bool = True
) -> Union[GPTModel, megatron.legacy.model.GPTModel]:  # noqa: UP007
    args = get_args()
    print_rank_0("a model of one's own")
    yaml = args.yaml_cfg is not None
    config = core_transformer_config_from_yaml(args) if yaml else core_transformer_config_from_args(args)
    stages = {"pre_process": pre_process, "post_process": post_process, "parallel_output": True}
    if args.use_legacy_models:
        return megatron.legacy.model.GPTModel(config, num_tokentypes=0, **stages)
    local = args.transformer_impl == "local"
    made = get_gpt_layer_local_spec if local else get_gpt_layer_with_transformer_engine_spec
    layers = (args.num_experts, args.moe_grouped_gemm, args.qk_layernorm)
    return GPTModel(
        config=config,
        transformer_layer_spec=made(*layers) if args.spec is None else import_module(args.spec),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        **stages,
    )


def loss_func(loss_mask: Tensor, output: Tensor, non_loss_data: bool = False) -> Any:
    args = get_args()
    if non_loss_data:
        return output.detach().clone()
    mask = loss_mask.view(-1).float()
    sums = torch.stack([(output.float().view(-1) * mask).sum(), mask.sum()])
    if args.context_parallel_size > 1:
        torch.distributed.all_reduce(sums, group=mpu.get_context_parallel_group())
    assert not (args.check_for_nan_in_loss_and_grad and sums[0].isnan()), "the loss is no number"
    reported = sums.clone().detach()
    torch.distributed.all_reduce(reported, group=mpu.get_data_parallel_group())
    tokens = sums[1].clone().detach().to(torch.int)
    return sums[0] * args.context_parallel_size, tokens, {"lm loss": (reported[0], reported[1])}


def forward_step(data_iterator: Any, model: GPTModel) -> tuple[Tensor, Any]:
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        batch: tuple = (None,) * 5
        if mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage():
            fields = get_batch_on_this_cp_rank(get_batch_on_this_tp_rank(data_iterator))
            batch = tuple(fields.values())
    timers("batch-generator").stop()
    tokens, labels, loss_mask, attention_mask, position_ids = batch
    with stimer:
        output = model(tokens, position_ids, attention_mask, labels=labels)
    return output, partial(loss_func, loss_mask)


def is_dataset_built_on_rank() -> bool:
    ends = mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()
    return ends and mpu.get_tensor_model_parallel_rank() == 0


class OwnSamples(torch.utils.data.Dataset):
    """Samples that come from no file of ours."""

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.arange(index, index + self.length + 1) % 100
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self.length),
            "position_ids": torch.arange(self.length),
            "attention_mask": torch.ones(1, self.length, self.length).triu(1) > 0,
        }


def train_valid_test_datasets_provider(samples: list[int]) -> list[Any]:
    args = get_args()
    if not (args.mock_data or args.data_path):
        return [OwnSamples(4 * count, args.seq_length) for count in samples]
    paths = (args.train_data_path, args.valid_data_path, args.test_data_path)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=get_blend_from_list(args.data_path),
        blend_per_split=[get_blend_from_list(each) for each in paths],
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, is_dataset_built_on_rank, config).build()


def run() -> None:
    train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        process_non_loss_data_func=process_collected,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
    )
