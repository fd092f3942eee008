"""Rates of tools/preprocess_data.py, whole process with start-up, on text made from this machine's Python sources.

    python benchmarks/preprocess.py                  # 300 MB, about six minutes
    python benchmarks/preprocess.py --megabytes 30 --tokenizers gpt2

In one run it compares the tool with one and with two workers (the fastest of three runs each); its rate over v0.9's
(measured once on a quiet two-core machine: constants below); and, alone, in this process, on one thread, without reading
or writing files, HuggingFace's encoder or the engine itself, and pure-Python encoders (plain_encoders.py). Those are
timed by processor time, which other programs disturb least, as the tool is besides. `--json FILE` keeps the numbers with
what they were measured with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plain_encoders
from surroundings import surroundings

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
V09_MIB_PER_SECOND = {"gpt2": 1.40, "wordpiece": 1.08, "sentencepiece": 4.6}  # one worker
TARGET_RATIO = {"gpt2": 40, "wordpiece": 10, "sentencepiece": 2}
TRAINING_DOCUMENTS = 2000
VOCAB_SIZE = 32000
RIVAL_MEGABYTES = 20
PLAIN_MEGABYTES = 5
PACKAGES = ("numpy", "gigatoken", "tokenizers", "sentencepiece", "regex")


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
    with path.open("w", encoding="utf-8") as file:
        while True:
            for document in filter(None, python_sources()):
                if text_bytes >= megabytes * 1_000_000:
                    return text_bytes
                file.write(json.dumps({"text": document}) + "\n")
                text_bytes += len(document.encode("utf-8"))


def train(corpus: Path, folder: Path, model: str) -> None:
    """A vocabulary of the size that models use."""
    run_tool(
        "train_tokenizer.py",
        *("--input", corpus, "--model", model, "--vocab-size", VOCAB_SIZE, "--output-dir", folder),
        *("--max-documents", TRAINING_DOCUMENTS),
    )


@dataclass(frozen=True, order=True)
class Cost:
    """What a tool took, with all its processes, and its largest process.

    The kernel counts the memory of the process that started it as its own, so this one must stay small meanwhile.
    """

    seconds: float
    processor_seconds: float
    largest_process_mib: float


def run_tool(name: str, *arguments: object) -> Cost:
    """Run a tool as a user would."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            output.seek(0)
            sys.exit(f"{' '.join(command)}\n{output.read().decode()}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def first_texts(corpus: Path, megabytes: int) -> tuple[list[str], float]:
    """The first texts of the corpus and their MiB."""
    texts: list[str] = []
    size = 0
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode("utf-8"))
            if size >= megabytes * 1_000_000:
                break
    return texts, size / MIB


def rate(encode: Callable[[list[str]], object], corpus: Path, megabytes: int) -> float:
    """MiB per second of processor time of an encoder on the first texts of the corpus, after a warm-up document."""
    texts, size = first_texts(corpus, megabytes)
    encode(texts[:1])
    start = time.process_time()
    encode(texts)
    return size / (time.process_time() - start)


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


@dataclass(frozen=True)
class Case:
    """One tokenizer: how to train it, the tool's flags for it, and what it is compared with."""

    model: str
    rival_name: str
    flags: Callable[[Path], list[str]]
    rival: Callable[[Path], Callable[[list[str]], object]]
    plain: Callable[[Path], Callable[[str], list[int]]] | None = None


CASES = {
    "gpt2": Case(
        "bpe",
        "HF ByteLevel BPE",
        lambda folder: [
            *("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(folder / "vocab.json")),
            *("--merge-file", str(folder / "merges.txt"), "--append-eod"),
        ],
        hf_byte_level,
        plain_encoders.byte_level_bpe,
    ),
    "wordpiece": Case(
        "wordpiece",
        "HF WordPiece",
        lambda folder: [
            *("--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", str(folder / "vocab.txt"))
        ],
        hf_wordpiece,
        plain_encoders.wordpiece,
    ),
    "sentencepiece": Case(
        "unigram",
        "sentencepiece itself",
        lambda folder: [
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(folder / "tokenizer.model"), "--append-eod"),
        ],
        sentencepiece_engine,
    ),
}


def measure(name: str, workers: int, corpus: Path, folder: Path, size: float, repeats: int) -> dict[str, Any]:
    """The fastest of some runs of the tool: a row of the result."""
    options = ("--input", corpus, "--workers", workers, "--output-prefix", folder / "out")
    cost = min(run_tool("preprocess_data.py", *options, *CASES[name].flags(folder)) for _ in range(repeats))
    reference = V09_MIB_PER_SECOND[name]
    return {
        "tokenizer": name,
        "workers": workers,
        "MiB/s": round(size / cost.seconds, 1),
        "MiB/s of processor time": round(size / cost.processor_seconds, 1),
        "v0.9 MiB/s": reference,
        "times v0.9": round(size / cost.seconds / reference, 1),
        "wanted with one worker": TARGET_RATIO[name],
        "largest process MiB": round(cost.largest_process_mib),
        "load average": round(os.getloadavg()[0], 1),
    }


def alone(case: Case, corpus: Path, folder: Path) -> dict[str, float]:
    """MiB per second of the encoders that the tool is compared with."""
    rates = {case.rival_name: round(rate(case.rival(folder), corpus, RIVAL_MEGABYTES), 1)}
    if case.plain is not None:
        encode = case.plain(folder)
        python = rate(lambda texts: [encode(text) for text in texts], corpus, PLAIN_MEGABYTES)
        rates["pure Python"] = round(python, 2)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--tokenizers", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the fastest counts")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers to this file")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows: list[dict[str, Any]] = []
    beside: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "corpus.jsonl"
        size = write_corpus(corpus, args.megabytes) / MIB
        print(f"{size:.0f} MiB of text, {os.cpu_count()} cores; MiB of text per second, start-up included")
        for name in args.tokenizers:
            case, folder = CASES[name], Path(temporary) / name
            train(corpus, folder, case.model)
            for workers in args.workers:
                row = measure(name, workers, corpus, folder, size, args.repeats)
                print(
                    f"{name:13} {workers} worker(s): {row['MiB/s']:6.1f} MiB/s ({row['MiB/s of processor time']:.1f} by "
                    f"processor time) = {row['times v0.9']:5.1f}x v0.9's {row['v0.9 MiB/s']} (wanted with one worker: "
                    f"{row['wanted with one worker']}x), largest process {row['largest process MiB']} MiB, "
                    f"load average {row['load average']}",
                    flush=True,
                )
                rows.append(row)
        for name in args.tokenizers:
            beside[name] = alone(CASES[name], corpus, Path(temporary) / name)
            listed = ", ".join(f"{encoder} {number}" for encoder, number in beside[name].items())
            print(f"{name:13} alone, one thread, no files: {listed} MiB/s", flush=True)
    if args.json is not None:
        record = {
            **surroundings(PACKAGES),
            "text MiB": round(size),
            "repeats": args.repeats,
            "runs": rows,
            "encoders alone, MiB/s of processor time": beside,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
