"""Embed the texts of loose JSON with a BERT: `python tools/bert_embedding/embed_json.py --texts FILE --blocks DIR ...`.

Takes the flags of pretrain_bert.py for the model and the tokenizer, with --output-bert-embeddings; under torchrun the
processes share the work. Writes DIR/START-END.hdf5, `data` [texts, hidden size] in the order of FILE; run again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.core.errors import DataError
from megatron.training import initialize_megatron
from megatron.training.cli import run_main
from tools.bert_embedding import BertEmbedder, DiskDataParallelBertEmbedder


class JsonTexts:
    """The objects of loose JSON by line; only where each begins is in memory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 (read from for as long as this lives)
        self._starts = [0]
        for line in self._file:
            self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._file.seek(self._starts[index])
        try:
            document = json.loads(self._file.readline().decode("utf-8"))
            if isinstance(document["text"], str):
                return document
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            reason = "its text is none"
        raise DataError(
            f"{self.path}:{index + 1}", f"not a JSON object with a text ({reason})", "mend that line"
        )


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What to embed."""
    group = parser.add_argument_group("embedding")
    group.add_argument("--texts", required=True, help="Loose JSON, a text in each line.")
    group.add_argument("--blocks", required=True, help="Directory of the vectors.")
    group.add_argument("--block-size", type=int, default=100_000, help="Texts in a file.")
    return parser


def main() -> None:
    """Embed as the command line says."""
    args = initialize_megatron(extra_args_provider=add_flags).args
    embedder = BertEmbedder(args.micro_batch_size, args.seq_length, args.bert_embedder_type)
    DiskDataParallelBertEmbedder(embedder, args.block_size).embed_text_dataset(
        args.texts, args.blocks, JsonTexts(args.texts)
    )


if __name__ == "__main__":
    run_main(main)
