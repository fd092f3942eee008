"""The command line of tools/preprocess_data.py, older spellings included."""

from __future__ import annotations

import argparse
import sys

from megatron.core.errors import FlagError
from megatron.training.preprocessing.inputs import STANDARD_INPUT, Shard
from megatron.training.preprocessing.sentences import SPLITTERS
from megatron.training.tokenizer.bpe import ENGINES
from megatron.training.tokenizer.tokenizer import DEFAULT_SIZE_DIVISOR, TOKENIZERS

# Unambiguous beginnings of these are accepted, as ever; options that came later must not make them ambiguous.
ABBREVIABLE = (
    "--input", "--json-keys", "--split-sentences", "--keep-newlines", "--tokenizer-type", "--tokenizer-model",
    "--vocab-file", "--vocab-size", "--merge-file", "--append-eod", "--lang", "--output-prefix", "--workers",
    "--partitions", "--log-interval", "--keep-sequential-samples",
)  # fmt: skip
RENAMED = {"--vocab": "--vocab-file", "--json-key": "--json-keys", "--merges-file": "--merge-file"}
WITHOUT_EFFECT = {
    "--dataset-impl": "token files are always memory-mappable",
    "--chunk-size": "documents are sent to workers by size",
}
UNAVAILABLE = ("Llama3Tokenizer", "MistralTokenizer")


def build_parser() -> argparse.ArgumentParser:
    """The parser; `parse` puts older spellings into today's first."""
    parser = argparse.ArgumentParser(
        description="Tokenize JSON documents into token files (PREFIX_KEY_LEVEL.bin and .idx)."
    )
    group = parser.add_argument_group("input data")
    group.add_argument(
        "--input",
        required=True,
        help="JSON lines, plain, .gz or .zst, or .parquet: a file, a directory, a pattern, or - for standard input.",
    )
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], help="Fields to encode; each gets its own files."
    )
    group.add_argument("--split-sentences", action="store_true", help="Split documents into sentences.")
    group.add_argument(
        "--keep-newlines", action="store_true", help="Keep whitespace behind sentences when splitting."
    )
    group.add_argument(
        "--sentence-splitter",
        choices=SPLITTERS,
        default="punkt",
        help="punkt: NLTK's trained model. simple: a built-in rule that needs no model and gives other sentences.",
    )
    group.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="At a malformed line, stop with its file and number, or report it, skip it and count it.",
    )
    group.add_argument(
        "--shard",
        default=None,
        metavar="I/N",
        help="Encode only part I (from 0) of N equal parts of the input, into PREFIX_shard_I_of_N.",
    )
    group.add_argument(
        "--merge-shards",
        type=int,
        default=None,
        metavar="N",
        help="Instead of encoding, join the N finished shards; the result equals that of one run.",
    )

    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type", required=True, choices=[*TOKENIZERS, *UNAVAILABLE], help="Which tokenizer."
    )
    group.add_argument(
        "--tokenizer-model", default=None, help="SentencePiece or tiktoken file, HuggingFace name or path."
    )
    group.add_argument("--vocab-file", default=None, help="vocab.json (GPT-2) or vocab.txt (BERT).")
    group.add_argument(
        "--vocab-size", default=786, help="Ids of the NullTokenizer, or size for the TikTokenizer."
    )
    group.add_argument("--merge-file", default=None, help="merges.txt (GPT-2).")
    group.add_argument(
        "--append-eod", action="store_true", help="End every non-empty document with the eod token."
    )
    group.add_argument("--lang", default="english", help="Language of the sentence splitter.")
    group.add_argument(
        "--vocab-extra-ids", type=int, default=0, help="Sentinel tokens <extra_id_i> to add, for T5."
    )
    group.add_argument("--tiktoken-pattern", default=None, help="v1 or v2.")
    group.add_argument(
        "--tiktoken-num-special-tokens", type=int, default=1000, help="Ids kept for special tokens."
    )
    group.add_argument("--tiktoken-special-tokens", nargs="+", default=None, help="Their names.")
    group.add_argument(
        "--bpe-engine",
        choices=ENGINES,
        default="auto",
        help="Engine of the GPT2BPETokenizer; all give the same ids.",
    )

    group = parser.add_argument_group("output data")
    group.add_argument("--output-prefix", required=True, help="Beginning of the output paths.")
    group.add_argument(
        "--resume", action="store_true", help="Continue an interrupted run; start if there is none."
    )

    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=int, required=True, help="Processes that encode.")
    group.add_argument(
        "--partitions",
        type=int,
        default=1,
        help="Distribute documents over this many outputs, then join those.",
    )
    group.add_argument("--log-interval", type=int, default=1000, help="Documents between progress lines.")
    group.add_argument(
        "--keep-sequential-samples",
        action="store_true",
        help="Partition into contiguous parts: the order is kept.",
    )
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The checked command line. Usage errors end the process with status 2; FlagError for contradictions."""
    args = build_parser().parse_args(modernize(sys.argv[1:] if arguments is None else arguments))
    if args.tokenizer_type in UNAVAILABLE:
        raise FlagError(
            f"--tokenizer-type {args.tokenizer_type}",
            "this name was reserved and never implemented",
            "use --tokenizer-type HuggingFaceTokenizer --tokenizer-model DIRECTORY",
        )
    for flag, value in (("--workers", args.workers), ("--partitions", args.partitions)):
        if value < 1:
            raise FlagError(f"{flag} {value}", "it must be at least 1", f"{flag} 1")
    if args.log_interval < 1:
        raise FlagError(f"--log-interval {args.log_interval}", "it must be at least 1", "--log-interval 1000")
    if args.shard is not None:
        args.shard = Shard.parse(args.shard)
        if args.partitions > 1:
            raise FlagError("--shard --partitions", "both divide the input", "drop --partitions")
        if args.merge_shards is not None:
            raise FlagError(
                "--shard --merge-shards", "one encodes, the other joins", "run them one after the other"
            )
    if args.merge_shards is not None and args.merge_shards < 1:
        raise FlagError(
            f"--merge-shards {args.merge_shards}", "there is at least one shard", "give the N of --shard I/N"
        )
    if args.input == STANDARD_INPUT:
        for flag, given in (
            ("--resume", args.resume),
            ("--shard", args.shard),
            ("--keep-sequential-samples", args.partitions > 1 and args.keep_sequential_samples),
        ):
            if given:
                raise FlagError(
                    f"{flag} --input -", "standard input can be read only once", "write it to a file first"
                )
    args.rank = 1  # building the tokenizer prints nothing
    args.make_vocab_size_divisible_by = DEFAULT_SIZE_DIVISOR
    args.tensor_model_parallel_size = 1
    if args.tokenizer_type == "TikTokenizer" and args.vocab_size == build_parser().get_default("vocab_size"):
        args.vocab_size = None
    if isinstance(args.vocab_size, str):
        args.vocab_size = _positive_integer("--vocab-size", args.vocab_size)
    return args


def _positive_integer(flag: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise FlagError(f"{flag} {text}", "it must be a positive whole number", f"{flag} 786")
    return int(text)


def modernize(arguments: list[str]) -> list[str]:
    """The command line with today's option names; each change but a plain abbreviation is reported on stderr."""
    result: list[str] = []
    # Programs that call the tool put paths and numbers into sys.argv, too.
    rest = [str(argument) for argument in arguments]
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in WITHOUT_EFFECT:
            value = value if equals else (rest.pop(0) if rest else "")
            if name == "--dataset-impl" and value != "mmap":
                raise FlagError(f"{name} {value}", "only the mmap format exists", "drop the flag")
            _notice(f"{name} has no effect: {WITHOUT_EFFECT[name]}")
            continue
        if name in RENAMED:
            _notice(f"{name} is now {RENAMED[name]}")
            name = RENAMED[name]
        elif name.startswith("--") and len(name) > 2:
            full = [option for option in ABBREVIABLE if option.startswith(name)]
            name = full[0] if len(full) == 1 else name
        result.append(name + equals + value)
    return result


def _notice(text: str) -> None:
    print(f"preprocess_data.py: {text}", file=sys.stderr)
