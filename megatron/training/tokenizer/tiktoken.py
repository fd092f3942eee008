"""Byte-pair vocabularies for the tiktoken engine, in the JSON form of Mistral's `tekken` files."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

import numpy

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.errors import DataError, FlagError

PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
DEFAULT_VOCAB_SIZE = 1 << 17
REQUIRED_SPECIALS = ("<unk>", "<s>", "</s>")
SPECIAL_TEMPLATE = "<SPECIAL_{id}>"


def reload_mergeable_ranks(path: str, max_vocab: int | None = None) -> dict[bytes, int]:
    """Token bytes -> rank of the first `max_vocab` entries of a vocabulary file.

    Errors: DataError when the file is not the list of {rank, token_bytes, token_str} with the single bytes first.
    """
    if not path.endswith(".json"):
        raise DataError(
            path, "the name of a tiktoken vocabulary ends in .json", "convert it to the JSON form"
        )
    with open(path, encoding="utf-8") as file:
        entries = json.load(file)
    if max_vocab is not None:
        entries = entries[:max_vocab]
    ranks: dict[bytes, int] = {}
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.keys() != {"rank", "token_bytes", "token_str"}:
            raise DataError(
                path, f"entry {position} does not have exactly the keys rank, token_bytes and token_str"
            )
        token = base64.b64decode(entry["token_bytes"])
        if entry["rank"] != position:
            raise DataError(path, f"entry {position} has rank {entry['rank']}", "sort the entries by rank")
        if position < 256 and token != bytes([position]):
            raise DataError(path, f"entry {position} is {token!r}", "put the 256 single bytes first")
        ranks[token] = position
    if len(ranks) != len(entries):
        raise DataError(path, "a token occurs twice")
    return ranks


class CustomTikTokenizer(MegatronTokenizer):
    """`--tokenizer-type TikTokenizer`: special tokens have the first ids, the ranks of the file follow.

    Special tokens in text are ordinary characters.
    """

    def __init__(
        self,
        path: str,
        pattern: str,
        vocab_size: int | None,
        num_special_tokens: int,
        special_tokens: list[str] | None,
    ) -> None:
        super().__init__(
            path,
            pattern=pattern,
            vocab_size=vocab_size,
            num_special_tokens=num_special_tokens,
            special_tokens=special_tokens,
        )
        import tiktoken

        vocab_size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
        names = list(REQUIRED_SPECIALS if special_tokens is None else special_tokens)
        _check_specials(names, num_special_tokens, vocab_size)
        names += [SPECIAL_TEMPLATE.format(id=i) for i in range(len(names), num_special_tokens)]
        self.special_filler = names[len(special_tokens or REQUIRED_SPECIALS) :]
        ranks = reload_mergeable_ranks(path, vocab_size - num_special_tokens)
        if num_special_tokens + len(ranks) != vocab_size:
            raise DataError(
                path,
                f"{len(ranks)} tokens and {num_special_tokens} special tokens do not make a vocabulary of {vocab_size}",
                f"--vocab-size {len(ranks) + num_special_tokens}",
            )
        self._special_ids = {name: token_id for token_id, name in enumerate(names)}
        self._num_special_tokens = num_special_tokens
        self._vocab_size = vocab_size
        # The engine takes ranks as ids; ours come after the special tokens.
        self._model = tiktoken.Encoding(
            name=path, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
        )
        self._id_to_token = dict(enumerate(names))
        self._id_to_token |= {
            rank + num_special_tokens: token.decode("utf-8", errors="replace")
            for token, rank in ranks.items()
        }
        self._token_to_id = {token: token_id for token_id, token in self._id_to_token.items()}
        self._unk_id, self._bos_id, self._eos_id = (self._special_ids[name] for name in REQUIRED_SPECIALS)

    @property
    def bos(self) -> int:
        return self._bos_id

    @property
    def eos(self) -> int:
        return self._eos_id

    @property
    def unk(self) -> int:
        return self._unk_id

    @property
    def eod(self) -> int:
        return self._eos_id

    @property
    def vocab(self) -> dict[str, int]:
        return self._token_to_id

    @property
    def inv_vocab(self) -> dict[int, str]:
        return self._id_to_token

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def encoder(self) -> dict[str, int]:
        return self._token_to_id

    @property
    def decoder(self) -> dict[int, str]:
        return self._id_to_token

    def tokenize(self, s: str, bos: bool = False, eos: bool = False) -> list[int]:
        return [self._bos_id] * bos + self.encode_document(s).tolist() + [self._eos_id] * eos

    def encode_document(self, text: str) -> numpy.ndarray:
        """Ids [t] of a text, as an array."""
        return (
            self._model.encode_to_numpy(text, disallowed_special=()).astype(numpy.int32)
            + self._num_special_tokens
        )

    def detokenize(self, tokens: Sequence[int] | numpy.ndarray) -> str:
        return b"".join(map(self._token_bytes, map(int, tokens))).decode("utf-8", errors="replace")

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Index of the character that each token starts in; special tokens take the room of their names."""
        starts: list[int] = []
        characters = 0
        for token in map(self._token_bytes, ids):
            continues = bool(token) and token[0] & 0xC0 == 0x80
            starts.append(max(0, characters - continues))
            characters += sum(byte & 0xC0 != 0x80 for byte in token)
        return starts

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id < self._num_special_tokens:
            return self._id_to_token[token_id].encode("utf-8")
        return self._model.decode_single_token_bytes(token_id - self._num_special_tokens)


def _check_specials(names: list[str], count: int, vocab_size: int) -> None:
    """Refuse lists of special tokens that leave no unambiguous layout of ids."""
    if len(set(names)) != len(names):
        raise FlagError("--tiktoken-special-tokens", "a token is given twice", "give each once")
    missing = [name for name in REQUIRED_SPECIALS if name not in names]
    if missing:
        raise FlagError("--tiktoken-special-tokens", f"the list lacks {' '.join(missing)}", "add them")
    if not len(names) <= count < vocab_size:
        raise FlagError(
            "--tiktoken-num-special-tokens",
            f"{count} must be at least the number of special tokens, {len(names)}, and less than the vocabulary "
            f"size, {vocab_size}",
            "change it or --vocab-size",
        )
