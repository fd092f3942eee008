"""Tokenizers of every `--tokenizer-type`."""

from megatron.training.tokenizer.tokenizer import build_tokenizer, padded_vocab_size

__all__ = ["build_tokenizer", "padded_vocab_size"]
