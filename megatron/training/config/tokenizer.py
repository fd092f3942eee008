"""Flags about the tokenizer and its vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.flags import flag

TOKENIZER_TYPES = (
    "BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer", "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer", "HuggingFaceTokenizer", "Llama2Tokenizer", "TikTokenizer", "NullTokenizer",
)  # fmt: skip


_BERT = ("BertWordPieceLowerCase", "BertWordPieceCase")


def _types(*names: str) -> str:
    return " or ".join(f"--tokenizer-type {name}" for name in names)


@dataclass
class TokenizerConfig:
    """How text becomes ids."""

    # fmt: off
    vocab_size: int | None = flag(
        None, group="data and dataloader", needs=_types("NullTokenizer", "TikTokenizer"),
        help="Vocabulary size before padding; NullTokenizer needs it, and other vocabularies have their own.")
    vocab_file: str | None = flag(
        None, group="data and dataloader", needs=_types("GPT2BPETokenizer", *_BERT), help="Vocabulary file.")
    merge_file: str | None = flag(
        None, group="data and dataloader", needs=_types("GPT2BPETokenizer"), help="Merges of a byte-pair vocabulary.")
    vocab_extra_ids: int = flag(
        0, group="data and dataloader", needs=_types(*_BERT, "SentencePieceTokenizer"), help="Extra ids for T5's spans.")
    tokenizer_type: str | None = flag(
        None, choices=TOKENIZER_TYPES, group="data and dataloader", help="Kind of tokenizer.")
    tokenizer_model: str | None = flag(
        None, group="data and dataloader",
        needs=_types(
            "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer",
            "TikTokenizer"),
        help="Model file, or name at the HuggingFace hub.")
    tiktoken_pattern: str | None = flag(
        None, group="data and dataloader",
        needs=_types("TikTokenizer"), help="Pattern that splits words, v1 or v2.")
    tiktoken_num_special_tokens: int = flag(
        1000, group="data and dataloader", needs=_types("TikTokenizer"), help="Ids kept free for special tokens.")
    tiktoken_special_tokens: list[str] | None = flag(
        None, nargs="+", group="data and dataloader",
        needs=_types("TikTokenizer"), help="The special tokens, in order.")
    # fmt: on
