"""Tokenizers in HuggingFace's format: a model directory, a hub name or a tokenizer.json."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.errors import FlagError

CONFIG_FILE = "tokenizer_config.json"


def _hub_is_known() -> bool:
    """Whether the hub's name resolves; without a network it does not."""
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


class _HuggingFaceTokenizer(MegatronTokenizer):
    """`--tokenizer-type HuggingFaceTokenizer`: what the `transformers` tokenizer does, its template included."""

    def __init__(self, pretrained_model_name_or_path: str, **kwargs: Any) -> None:
        super().__init__(pretrained_model_name_or_path, **kwargs)
        try:
            import transformers
        except ImportError as error:
            raise FlagError(
                "--tokenizer-type HuggingFaceTokenizer",
                "needs the package transformers",
                "pip install transformers",
            ) from error
        self._tokenizer: Any
        if os.path.isfile(pretrained_model_name_or_path):
            self._tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_file=pretrained_model_name_or_path,
                **(_special_token_names(pretrained_model_name_or_path) | kwargs),
            )
        else:
            # The hub's client tries for minutes to reach a hub that cannot be found.
            local = os.path.isdir(pretrained_model_name_or_path) or not _hub_is_known()
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                    pretrained_model_name_or_path, **({"local_files_only": True} if local else {}), **kwargs
                )
            except (OSError, ValueError) as error:
                raise FlagError(
                    f"--tokenizer-model {pretrained_model_name_or_path}",
                    f"there is no tokenizer of HuggingFace's format: {str(error).splitlines()[0]}",
                    "give a model directory, a tokenizer.json, or a hub name that was downloaded or can be",
                ) from error
        self._vocab = self._tokenizer.get_vocab()
        self._inv_vocab = {token_id: token for token, token_id in self._vocab.items()}
        self._document_encoder: Any = None

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @property
    def vocab(self) -> dict[str, int]:
        return self._vocab

    @property
    def inv_vocab(self) -> dict[int, str]:
        return self._inv_vocab

    @property
    def decoder(self) -> dict[int, str]:
        return self._inv_vocab

    def tokenize(self, text: str, **kwargs: Any) -> list[int]:
        return self._tokenizer(text, verbose=False, **kwargs).input_ids

    def encode_document(self, text: str) -> numpy.ndarray:
        """Ids [t] of a text from a corpus: a special token written out in it stays ordinary text."""
        if not self._tokenizer.is_fast:
            return numpy.array(self.tokenize(text, split_special_tokens=True), dtype=numpy.int32)
        if self._document_encoder is None:
            import tokenizers

            self._document_encoder = tokenizers.Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
            self._document_encoder.no_truncation()
            self._document_encoder.no_padding()
            self._document_encoder.encode_special_tokens = True
        return numpy.array(self._document_encoder.encode_batch_fast([text])[0].ids, dtype=numpy.int32)

    def detokenize(self, ids: Sequence[int] | numpy.ndarray, **kwargs: Any) -> str:
        return self._tokenizer.decode([int(token_id) for token_id in ids], **kwargs)

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Position in `text` at which each token starts; a token of the template stands where the last one ended."""
        encoding = self._tokenizer(text, verbose=False)
        starts: list[int] = []
        end = 0
        for i in range(len(ids)):
            span = encoding.token_to_chars(i)
            if span is not None:
                starts.append(span.start)
                end = span.end
            else:
                starts.append(end)
        return starts

    @property
    def eod(self) -> int:
        token_id = self._tokenizer.eos_token_id
        if token_id is None:
            path = self.unique_identifiers["tokenizer_path"][0]
            raise FlagError(
                f"--tokenizer-model {path}",
                "the tokenizer names no end-of-sequence token, which would end documents",
                f'put a {CONFIG_FILE} with an "eos_token" beside it, and give the directory',
            )
        return token_id


def _special_token_names(tokenizer_file: str) -> dict[str, str]:
    """The special tokens that the configuration beside a tokenizer.json names, as constructor options."""
    path = os.path.join(os.path.dirname(tokenizer_file), CONFIG_FILE)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    names: dict[str, str] = {}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token"):
        value = config.get(role)
        if value is not None:
            names[role] = value["content"] if isinstance(value, dict) else value
    return names
