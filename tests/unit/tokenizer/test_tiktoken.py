"""The tiktoken type against the engine with special tokens in front, and its checks."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings

from megatron.core.errors import DataError, FlagError
from megatron.training.tokenizer.tiktoken import PATTERNS, CustomTikTokenizer, reload_mergeable_ranks
from tests.unit.tokenizer.hostile import hostile_text

PATH = str(Path(__file__).parents[2] / "golden" / "data" / "vocab" / "tiktoken.json")
ENTRIES = json.loads(Path(PATH).read_text(encoding="utf-8"))
SPECIALS = 10
SIZE = 310


def build(
    path: str = PATH, pattern: str = "v2", size: int | None = SIZE, specials: list[str] | None = None
) -> CustomTikTokenizer:
    return CustomTikTokenizer(path, PATTERNS[pattern], size, SPECIALS, specials)


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=hostile_text)
@settings(max_examples=100, deadline=None)
def test_ids_are_shifted_ranks(pattern: str, text: str) -> None:
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in ENTRIES[: SIZE - SPECIALS]}
    shifted = {token: rank + SPECIALS for token, rank in ranks.items()}
    engine = tiktoken.Encoding(
        "reference", pat_str=PATTERNS[pattern], mergeable_ranks=shifted, special_tokens={}
    )
    tokenizer = build(pattern=pattern)
    ids = tokenizer.tokenize(text)
    assert ids == engine.encode_ordinary(text)
    assert tokenizer.detokenize(ids) == text
    assert tokenizer.offsets(ids, text) == engine.decode_with_offsets(ids)[1]
    assert tokenizer.tokenize(text, bos=True, eos=True) == [tokenizer.bos, *ids, tokenizer.eos]


@pytest.mark.parametrize(
    ("specials", "why"),
    [
        (["<unk>", "<s>"], "lacks </s>"),
        (["<unk>", "<s>", "</s>", "<s>"], "given twice"),
        (["<unk>", "<s>", "</s>", *map(str, range(20))], "at least the number"),
    ],
)
def test_special_token_lists(specials: list[str], why: str) -> None:
    with pytest.raises(FlagError, match=why):
        build(specials=specials)


def test_vocabulary_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ends in .json"):
        reload_mergeable_ranks("vocab.bin")
    path = tmp_path / "vocab.json"
    for damage, why in (
        ([{"rank": 0}], "exactly the keys"),
        ([ENTRIES[1]], "has rank 1"),
        ([ENTRIES[1] | {"rank": 0}], "256 single bytes first"),
    ):
        path.write_text(json.dumps(damage), encoding="utf-8")
        with pytest.raises(DataError, match=why):
            reload_mergeable_ranks(str(path))
    with pytest.raises(DataError, match="do not make a vocabulary of 131072"):
        build(size=None)
