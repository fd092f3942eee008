"""Training vocabularies from a corpus: byte-level BPE, WordPiece, SentencePiece."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from itertools import islice

from megatron.core.errors import DataError, FlagError, MegatronError
from megatron.training.preprocessing.documents import BadDocument, read_documents
from megatron.training.preprocessing.inputs import find_inputs, read_chunks

END_OF_TEXT = "<|endoftext|>"
BYTE_COUNT = 256
WORDPIECE_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MAX_SENTENCE_BYTES = 1 << 16


def parser() -> argparse.ArgumentParser:
    """The command line of tools/train_tokenizer.py."""
    parser = argparse.ArgumentParser(description="Train a vocabulary from JSONL (also gzip, zstd, parquet).")
    parser.add_argument(
        "--input", required=True, help="A file, a directory, a pattern, or - for standard input."
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="Fields to train on.")
    parser.add_argument(
        "--model",
        choices=list(TRAINERS),
        default="bpe",
        help="bpe: vocab.json and merges.txt for GPT2BPETokenizer. wordpiece: vocab.txt for BertWordPiece*. "
        "unigram, sentencepiece-bpe: tokenizer.model for SentencePieceTokenizer, GPTSentencePieceTokenizer, "
        "Llama2Tokenizer.",
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="Tokens, the special ones included.")
    parser.add_argument("--output-dir", required=True, help="Where the files go.")
    parser.add_argument(
        "--max-documents", type=int, default=None, help="Train on the first N documents only."
    )
    parser.add_argument(
        "--min-frequency", type=int, default=2, help="bpe, wordpiece: merge only what occurs this often."
    )
    parser.add_argument("--cased", action="store_true", help="wordpiece: keep case and accents.")
    parser.add_argument(
        "--byte-fallback", action="store_true", help="sentencepiece: spell unknown characters in bytes."
    )
    parser.add_argument(
        "--pad-id", type=int, default=-1, help="sentencepiece: id of <pad>; -1 for none. T5 needs 0."
    )
    parser.add_argument("--unk-id", type=int, default=0, help="sentencepiece: id of <unk>.")
    parser.add_argument("--bos-id", type=int, default=1, help="sentencepiece: id of <s>; -1 for none.")
    parser.add_argument("--eos-id", type=int, default=2, help="sentencepiece: id of </s>; -1 for none.")
    return parser


def texts(args: argparse.Namespace) -> Iterator[str]:
    """Every text of the corpus that `args` name."""
    lines = (
        (chunk, line)
        for chunk in read_chunks(find_inputs(args.input), keys=args.json_keys)
        for line in read_documents(chunk, args.json_keys)
    )
    for chunk, line in islice(lines, args.max_documents):
        if isinstance(line.texts, BadDocument):
            raise DataError(
                f"{chunk.path}, after byte {chunk.offset}", str(line.texts), "repair or remove the line"
            )
        for value in line.texts:
            yield from [value] if isinstance(value, str) else value


def _tokenizers(model: str) -> object:
    try:
        import tokenizers
    except ImportError as error:
        raise FlagError(
            f"--model {model}", "needs the package tokenizers", "pip install tokenizers"
        ) from error
    return tokenizers


def train_bpe(args: argparse.Namespace) -> list[str]:
    """Write vocab.json and merges.txt; `<|endoftext|>` has the last id."""
    _tokenizers("bpe")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if args.vocab_size <= BYTE_COUNT:
        raise FlagError(
            f"--vocab-size {args.vocab_size}",
            f"the {BYTE_COUNT} bytes and {END_OF_TEXT} already take {BYTE_COUNT + 1}",
            "give more",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size - 1,
        min_frequency=args.min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(args), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    vocab[END_OF_TEXT] = len(vocab)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return [
        _write(args.output_dir, "vocab.json", json.dumps(vocab, ensure_ascii=False)),
        _write(args.output_dir, "merges.txt", "".join(line + "\n" for line in ["#version: 0.2", *merges])),
    ]


def train_wordpiece(args: argparse.Namespace) -> list[str]:
    """Write vocab.txt."""
    _tokenizers("wordpiece")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not args.cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=args.vocab_size,
        min_frequency=args.min_frequency,
        special_tokens=WORDPIECE_SPECIALS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(args), trainer)
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return [_write(args.output_dir, "vocab.txt", "".join(token + "\n" for token, _ in tokens))]


def train_sentencepiece(args: argparse.Namespace) -> list[str]:
    """Write tokenizer.model."""
    try:
        import sentencepiece
    except ImportError as error:
        raise FlagError(
            f"--model {args.model}", "needs the package sentencepiece", "pip install sentencepiece"
        ) from error
    os.makedirs(args.output_dir, exist_ok=True)
    path = os.path.join(args.output_dir, "tokenizer.model")
    lines = (line for text in texts(args) for line in text.split("\n") if line.strip())
    with open(path + ".tmp", "wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines,
                model_writer=file,
                vocab_size=args.vocab_size,
                model_type="unigram" if args.model == "unigram" else "bpe",
                byte_fallback=args.byte_fallback,
                pad_id=args.pad_id,
                unk_id=args.unk_id,
                bos_id=args.bos_id,
                eos_id=args.eos_id,
                max_sentence_length=MAX_SENTENCE_BYTES,
                minloglevel=2,
            )
        except RuntimeError as error:
            os.unlink(path + ".tmp")
            raise FlagError(f"--model {args.model}", f"sentencepiece refuses: {error}") from error
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
    return [path]


TRAINERS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "bpe": train_bpe,
    "wordpiece": train_wordpiece,
    "unigram": train_sentencepiece,
    "sentencepiece-bpe": train_sentencepiece,
}


def _write(folder: str, name: str, content: str) -> str:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    with open(path + ".tmp", "w", encoding="utf-8", newline="\n") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
    return path


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; the exit status."""
    try:
        args = parser().parse_args(arguments)
        for path in TRAINERS[args.model](args):
            print(f"wrote {path}")
    except MegatronError as error:
        print(f"train_tokenizer.py: {error}", flush=True)
        return error.exit_code
    return 0
