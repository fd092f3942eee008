"""Tokenize JSON documents into `.bin` and `.idx` files: `python tools/preprocess_data.py --help`.

Programs with a loop of their own import `get_args` and `Encoder`, which takes one document at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import numpy

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.errors import DataError
from megatron.training.preprocessing import encode
from megatron.training.preprocessing.arguments import parse as get_args
from megatron.training.preprocessing.inputs import Chunk
from megatron.training.preprocessing.pipeline import main
from megatron.training.preprocessing.sentences import SentenceSplitter, build_splitter

__all__ = ["Encoder", "get_args", "main"]


class Encoder:
    """Encodes one JSON line at a time, in every process that called `initializer` (as a pool's workers do).

    What `initializer` makes belongs to the process: a pool sends the encoder itself to its workers with every line.
    """

    tokenizer: MegatronTokenizer
    splitter: SentenceSplitter
    _chunks: encode.Encoder

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def initializer(self) -> None:
        """Build the tokenizer and, with --split-sentences, the splitter."""
        args = self.args
        settings = encode.EncoderSettings(args, args.json_keys, numpy.dtype(numpy.int64), args.append_eod)
        Encoder._chunks = encode.Encoder(settings)
        Encoder.tokenizer = Encoder._chunks.tokenizer
        Encoder.splitter = staticmethod(lambda text: [text])
        if args.split_sentences:
            splitter = build_splitter(args.sentence_splitter, args.lang, args.keep_newlines)
            Encoder.splitter = staticmethod(splitter)

    def encode(self, json_line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
        """(token ids of each key, lengths of its sentences, characters of the line). DataError says what is wrong with it.

        A text is one sentence, a list of texts (which `split` makes) as many.
        """
        data = json_line.encode("utf-8", "surrogatepass")
        chunk = Encoder._chunks.encode(Chunk(0, "", 0, len(data), data=data))
        for _, reason in chunk.bad:
            raise DataError("document", reason)
        encoded = dict(zip(self.args.json_keys, chunk.keys))
        ids = {key: one.tokens.tolist() for key, one in encoded.items()}
        return ids, {key: one.lengths.tolist() for key, one in encoded.items()}, len(json_line)

    def split(self, json_line: str) -> tuple[str, int]:
        """(the line with a list of sentences in place of each key's text, characters of the line given)."""
        document = json.loads(json_line)
        sentences = {key: Encoder.splitter(document[key]) for key in self.args.json_keys}
        return json.dumps(sentences), len(json_line)


if __name__ == "__main__":
    sys.exit(main())
