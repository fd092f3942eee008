"""Pretrain a Mamba or hybrid model: `torchrun --nproc-per-node N pretrain_mamba.py <flags>`; plain `python` is one rank.

Data, batches and loss are GPT's; what differs is the model. The loop is in megatron/training/training.py.
"""

from __future__ import annotations

from megatron.core.enums import ModelType
from megatron.core.models.mamba import MambaModel
from megatron.training import get_args, pretrain
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.cli import run_main
from megatron.training.config import rules
from megatron.training.specs import named_spec
from megatron.training.utils import print_rank_0
from pretrain_gpt import forward_step, train_valid_test_datasets_provider


def model_provider(pre_process: bool = True, post_process: bool = True) -> MambaModel:
    """The layers of this pipeline stage; with the embedding if `pre_process`, with the output layer if `post_process`."""
    args = get_args()
    rules.check(args, rules.HYBRID)
    print_rank_0("building Mamba model ...")
    model = MambaModel(
        config=core_transformer_config_from_args(args),
        mamba_stack_spec=named_spec(args.spec, of_a_stack=True),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        hybrid_attention_ratio=args.hybrid_attention_ratio,
        hybrid_mlp_ratio=args.hybrid_mlp_ratio,
        hybrid_override_pattern=args.hybrid_override_pattern,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
    )
    for index, layer in enumerate(model.decoder.layers):
        print_rank_0(f" == params layer {index}: {sum(p.numel() for p in layer.parameters())}")
    return model


def run() -> None:
    """Pretrain as the command line says."""
    train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        model_name="hybrid models",
    )


def main() -> None:
    """Entry point of `pretrain-mamba`."""
    run_main(run)


if __name__ == "__main__":
    main()
