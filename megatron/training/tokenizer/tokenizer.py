"""From the command line to a tokenizer: one class per type, one registry line per class."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.errors import DataError, FlagError, MegatronError

PACKAGE = "megatron.training.tokenizer"
DEFAULT_SIZE_DIVISOR = 128


#: v0.9 has all of these in this module. Here each lives beside its engine, which is imported when it is asked for.
_HOMES = {
    "_BertWordPieceTokenizer": "bert_tokenization",
    "_GPT2BPETokenizer": "gpt2_tokenization",
    "_SentencePieceTokenizer": "sentencepiece",
    "_GPTSentencePieceTokenizer": "sentencepiece",
    "_Llama2Tokenizer": "sentencepiece",
    "_HuggingFaceTokenizer": "huggingface",
    "CustomTikTokenizer": "tiktoken",
    "reload_mergeable_ranks": "tiktoken",
    "_NullTokenizer": "null",
}


def _class(name: str) -> Callable[..., MegatronTokenizer]:
    """A tokenizer class by name: only the chosen type's module, and so its engine, is imported."""
    return getattr(import_module(f"{PACKAGE}.{_HOMES[name]}"), name)


def __getattr__(name: str) -> Any:
    """The same for importers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class(name)


def _file(args: argparse.Namespace, flag: str) -> str:
    """The value of a flag that names a file the tokenizer cannot do without."""
    path = getattr(args, flag.removeprefix("--").replace("-", "_"), None)
    if path is None:
        raise FlagError(flag, f"--tokenizer-type {args.tokenizer_type} needs it", f"add {flag} PATH")
    if not os.path.exists(path):
        raise FlagError(f"{flag} {path}", "there is no such file", "check the path")
    return path


def _bert(args: argparse.Namespace, lower_case: bool) -> MegatronTokenizer:
    extra_ids = getattr(args, "vocab_extra_ids", 0)
    return _class("_BertWordPieceTokenizer")(
        vocab_file=_file(args, "--vocab-file"), lower_case=lower_case, vocab_extra_ids=extra_ids
    )


def _gpt2(args: argparse.Namespace) -> MegatronTokenizer:
    return _class("_GPT2BPETokenizer")(
        _file(args, "--vocab-file"), _file(args, "--merge-file"), engine=getattr(args, "bpe_engine", "auto")
    )


def _sentencepiece(args: argparse.Namespace) -> MegatronTokenizer:
    return _class("_SentencePieceTokenizer")(
        _file(args, "--tokenizer-model"), vocab_extra_ids=getattr(args, "vocab_extra_ids", 0)
    )


def _gpt_sentencepiece(args: argparse.Namespace) -> MegatronTokenizer:
    return _class("_GPTSentencePieceTokenizer")(_file(args, "--tokenizer-model"))


def _llama2(args: argparse.Namespace) -> MegatronTokenizer:
    return _class("_Llama2Tokenizer")(_file(args, "--tokenizer-model"))


def _huggingface(args: argparse.Namespace, **kwargs: Any) -> MegatronTokenizer:
    if args.tokenizer_model is None:
        raise FlagError(
            "--tokenizer-model",
            "--tokenizer-type HuggingFaceTokenizer needs a directory, hub name or tokenizer.json",
        )
    return _class("_HuggingFaceTokenizer")(args.tokenizer_model, **kwargs)


def _tiktoken(args: argparse.Namespace) -> MegatronTokenizer:
    module = import_module(f"{PACKAGE}.tiktoken")
    pattern = getattr(args, "tiktoken_pattern", None)
    if pattern not in module.PATTERNS:
        raise FlagError(
            "--tiktoken-pattern", "--tokenizer-type TikTokenizer needs v1 or v2", "add --tiktoken-pattern v2"
        )
    return module.CustomTikTokenizer(
        path=_file(args, "--tokenizer-model"),
        pattern=module.PATTERNS[pattern],
        vocab_size=args.vocab_size,
        num_special_tokens=getattr(args, "tiktoken_num_special_tokens", 1000),
        special_tokens=getattr(args, "tiktoken_special_tokens", None),
    )


def _null(args: argparse.Namespace) -> MegatronTokenizer:
    if args.vocab_size is None:
        raise FlagError("--vocab-size", "--tokenizer-type NullTokenizer needs it", "add --vocab-size N")
    return _class("_NullTokenizer")(args.vocab_size)


TOKENIZERS: dict[str, Callable[..., MegatronTokenizer]] = {
    "BertWordPieceLowerCase": lambda args: _bert(args, lower_case=True),
    "BertWordPieceCase": lambda args: _bert(args, lower_case=False),
    "GPT2BPETokenizer": _gpt2,
    "SentencePieceTokenizer": _sentencepiece,
    "GPTSentencePieceTokenizer": _gpt_sentencepiece,
    "Llama2Tokenizer": _llama2,
    "HuggingFaceTokenizer": _huggingface,
    "TikTokenizer": _tiktoken,
    "NullTokenizer": _null,
}


def build_tokenizer(args: argparse.Namespace, **kwargs: Any) -> MegatronTokenizer:
    """The tokenizer that `args` describe; sets `args.padded_vocab_size` unless a checkpoint has set it.

    Reads tokenizer_type and the files and options of that type, rank, make_vocab_size_divisible_by and
    tensor_model_parallel_size. `kwargs` go to HuggingFace. Errors: FlagError for a missing or wrong option,
    DataError for a file that does not hold what the type needs, NotImplementedError for an unknown type.
    """
    if args.rank == 0:
        print(f"> building {args.tokenizer_type} tokenizer ...", flush=True)
    build = TOKENIZERS.get(args.tokenizer_type)
    if build is None:
        raise NotImplementedError(f"{args.tokenizer_type} tokenizer is not implemented.")
    try:
        tokenizer = build(args, **kwargs) if build is _huggingface else build(args)
    except ValueError as error:  # text that is no UTF-8, no JSON, no pair of tokens
        if isinstance(error, MegatronError):
            raise
        files = [args.vocab_file, args.merge_file, args.tokenizer_model]
        raise DataError(
            ", ".join(str(file) for file in files if file is not None) or args.tokenizer_type,
            f"it does not hold what --tokenizer-type {args.tokenizer_type} needs: {error}",
            "check that the file belongs to this type of tokenizer and is whole",
        ) from error
    if getattr(args, "padded_vocab_size", None) is None:
        args.padded_vocab_size = _vocab_size_with_padding(tokenizer.vocab_size, args)
    return tokenizer


def padded_vocab_size(
    vocab_size: int, divisor: int = DEFAULT_SIZE_DIVISOR, tensor_parallel_size: int = 1
) -> int:
    """`vocab_size` rounded up so that every tensor-parallel rank holds a multiple of `divisor` rows."""
    multiple = divisor * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def _vocab_size_with_padding(
    orig_vocab_size: int, args: argparse.Namespace, logging_enabled: bool = True
) -> int:
    """The padded size for `args`, printed on rank 0."""
    size = padded_vocab_size(
        orig_vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )
    if args.rank == 0 and logging_enabled:
        print(
            f" > padded vocab (size: {orig_vocab_size}) with {size - orig_vocab_size} dummy tokens "
            f"(new size: {size})",
            flush=True,
        )
    return size
