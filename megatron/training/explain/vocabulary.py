"""How large the vocabulary is when the tokenizer's files may be elsewhere."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron.core.errors import FlagError
from megatron.training.tokenizer import build_tokenizer
from megatron.training.tokenizer.tokenizer import padded_vocab_size

#: Vocabularies that everybody means by these tokenizer types.
USUAL_SIZES = {
    "GPT2BPETokenizer": 50257,
    "BertWordPieceLowerCase": 30522,
    "BertWordPieceCase": 28996,
    "Llama2Tokenizer": 32000,
}


@dataclass(frozen=True)
class Vocabulary:
    """Entries before padding (what the start-up report wants of a tokenizer), and where the number is from."""

    vocab_size: int
    note: str | None


def vocabulary(args: Namespace) -> Vocabulary:
    """Read the tokenizer if its files are here, else take `--vocab-size`, else the usual size; sets padded_vocab_size.

    FlagError if nothing tells the size.
    """
    found = _size(args)
    if getattr(args, "padded_vocab_size", None) is None:
        args.padded_vocab_size = padded_vocab_size(
            found.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
        )
    return found


def _size(args: Namespace) -> Vocabulary:
    files = [args.vocab_file, args.merge_file, args.tokenizer_model]
    named = [path for path in files if path is not None]
    if args.tokenizer_type == "NullTokenizer" or (named and all(Path(path).exists() for path in named)):
        quiet = Namespace(**vars(args))
        with contextlib.redirect_stdout(io.StringIO()):
            return Vocabulary(build_tokenizer(quiet).vocab_size, None)
    extra = getattr(args, "vocab_extra_ids", 0) or 0
    if args.vocab_size is not None:
        return Vocabulary(args.vocab_size, f"vocabulary of {args.vocab_size}, from --vocab-size")
    if args.tokenizer_type in USUAL_SIZES:
        size = USUAL_SIZES[args.tokenizer_type] + extra
        missing = ", ".join(named) or "its files"
        return Vocabulary(
            size, f"assumed: vocabulary of {size}, usual for {args.tokenizer_type} ({missing} not here)"
        )
    raise FlagError(
        "--vocab-size",
        f"{args.tokenizer_type}'s files are not here, so the size of its vocabulary is unknown",
        "add --vocab-size N",
    )
