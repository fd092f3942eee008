"""Rates of tools/preprocess_data.py, whole process with start-up, on text made from this machine's Python sources.

    python benchmarks/preprocess.py                  # 300 MB, about ten minutes
    python benchmarks/preprocess.py --megabytes 30 --tokenizers gpt2

Each line compares, in one run: the tool with one and with two workers; the tool's rate over v0.9's (measured once on a
two-core machine: constants below); and the HuggingFace encoder alone, in this process, on one thread, without reading
or writing files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
V09_MIB_PER_SECOND = {"gpt2": 1.40, "wordpiece": 1.08, "sentencepiece": 4.6}  # one worker
TARGET_RATIO = {"gpt2": 40, "wordpiece": 10, "sentencepiece": 2}
TRAINING_DOCUMENTS = 2000
VOCAB_SIZE = 32000
HF_MEGABYTES = 20


def python_sources() -> Iterator[str]:
    """Every readable Python file of this installation, in a fixed order."""
    folders = sorted({Path(entry) for entry in sys.path if Path(entry).is_dir()} - {ROOT})
    seen: set[Path] = set()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if path not in seen:
                seen.add(path)
                try:
                    yield path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue


def write_corpus(path: Path, megabytes: int) -> int:
    """JSONL with that much text, files repeated if there are too few; bytes of text."""
    text_bytes = 0
    documents = [document for document in python_sources() if document]
    with path.open("w", encoding="utf-8") as file:
        for document in cycle(documents):
            if text_bytes >= megabytes * 1_000_000:
                return text_bytes
            file.write(json.dumps({"text": document}) + "\n")
            text_bytes += len(document.encode("utf-8"))
    return text_bytes


def train(corpus: Path, folder: Path, model: str) -> None:
    """A vocabulary of the size that models use."""
    run_tool(
        "train_tokenizer.py",
        *("--input", corpus, "--model", model, "--vocab-size", VOCAB_SIZE, "--output-dir", folder),
        *("--max-documents", TRAINING_DOCUMENTS),
    )


def run_tool(name: str, *arguments: object) -> float:
    """Run a tool as a user would; seconds."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    start = time.perf_counter()
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)}\n{finished.stderr}")
    return time.perf_counter() - start


def hf_rate(encode: Callable[[list[str]], object], corpus: Path) -> float:
    """MiB/s of an encoder on the first texts of the corpus, after a warm-up document."""
    texts: list[str] = []
    size = 0
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode("utf-8"))
            if size >= HF_MEGABYTES * 1_000_000:
                break
    encode(texts[:1])
    start = time.perf_counter()
    encode(texts)
    return size / MIB / (time.perf_counter() - start)


def hf_byte_level(folder: Path) -> Callable[[list[str]], object]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer.encode_batch_fast


def hf_wordpiece(folder: Path) -> Callable[[list[str]], object]:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer.encode_batch_fast


def sentencepiece_engine(folder: Path) -> Callable[[list[str]], object]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return lambda texts: [processor.encode_as_ids(text) for text in texts]


CASES: dict[
    str, tuple[str, str, Callable[[Path], list[str]], Callable[[Path], Callable[[list[str]], object]]]
] = {
    "gpt2": (
        "bpe",
        "HF ByteLevel BPE",
        lambda folder: [
            *("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(folder / "vocab.json")),
            *("--merge-file", str(folder / "merges.txt"), "--append-eod"),
        ],
        hf_byte_level,
    ),
    "wordpiece": (
        "wordpiece",
        "HF WordPiece",
        lambda folder: [
            "--tokenizer-type",
            "BertWordPieceLowerCase",
            "--vocab-file",
            str(folder / "vocab.txt"),
        ],
        hf_wordpiece,
    ),
    "sentencepiece": (
        "unigram",
        "sentencepiece itself",
        lambda folder: [
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(folder / "tokenizer.model"), "--append-eod"),
        ],
        sentencepiece_engine,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--tokenizers", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = folder / "corpus.jsonl"
        text_bytes = write_corpus(corpus, args.megabytes)
        print(
            f"{text_bytes / MIB:.0f} MiB of text, {os.cpu_count()} cores; MiB of text per second, start-up included"
        )
        for name in args.tokenizers:
            model, rival, flags, build = CASES[name]
            train(corpus, folder / name, model)
            for workers in args.workers:
                seconds = run_tool(
                    "preprocess_data.py",
                    *("--input", corpus, "--workers", workers, "--output-prefix", folder / name / "out"),
                    *flags(folder / name),
                )
                rate = text_bytes / MIB / seconds
                reference, target = V09_MIB_PER_SECOND[name], TARGET_RATIO[name]
                print(
                    f"{name:13} {workers} worker(s): {rate:7.1f} MiB/s = {rate / reference:5.1f}x v0.9's {reference} "
                    f"(wanted with one worker: {target}x)",
                    flush=True,
                )
            rate = hf_rate(build(folder / name), corpus)
            print(f"{'':13} {rival}, one thread, no files: {rate:.1f} MiB/s", flush=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        print(f"largest process: {peak / 1024:.0f} MiB resident")


if __name__ == "__main__":
    main()
