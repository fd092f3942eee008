"""Both BPE engines against the definition: hostile text, arbitrary merge tables, bounded memory."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.errors import DataError, FlagError
from megatron.training.tokenizer import bpe
from megatron.training.tokenizer.gpt2_tokenization import GPT2Tokenizer, _GPT2BPETokenizer
from tests.unit.tokenizer import reference_bpe
from tests.unit.tokenizer.hostile import hostile_text

VOCAB = Path(__file__).parents[2] / "golden" / "data" / "vocab"
FILES = (str(VOCAB / "gpt2-vocab.json"), str(VOCAB / "gpt2-merges.txt"))
ENGINES = {name: GPT2Tokenizer(*FILES, engine=name) for name in ("gigatoken", "python")}
ALPHABET = ["a", "b", "c", "Ġ", "'", *map(reference_bpe.stand_ins().__getitem__, "é你".encode())]


@pytest.mark.parametrize("engine", ENGINES)
@given(text=hostile_text)
@settings(max_examples=150, deadline=None)
def test_ids_follow_the_definition(engine: str, text: str) -> None:
    tokenizer = ENGINES[engine]
    expected = reference_bpe.encode(text, tokenizer.encoder, tokenizer.bpe_ranks)
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text


@pytest.mark.parametrize("engine", ENGINES)
def test_ids_are_those_of_transformers(engine: str) -> None:
    transformers = pytest.importorskip("transformers")
    slow = transformers.GPT2Tokenizer(vocab=FILES[0], merges=FILES[1])
    text = "The quick brown fox doesn't jump 1234 times;  naïve café 你好 😀\n\n\tdef f(x): return x**2"
    assert ENGINES[engine].encode(text) == slow.encode(text, add_special_tokens=False)


@st.composite
def merge_tables(draw: st.DrawFn) -> list[tuple[str, str]]:
    pieces, merges = list(ALPHABET), []
    for _ in range(draw(st.integers(0, 15))):
        pair = (draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces)))
        if pair not in merges and len(pair[0] + pair[1]) <= 10:
            merges.append(pair)
            pieces.append(pair[0] + pair[1])
    return draw(st.permutations(merges)) if draw(st.booleans()) else merges


@given(merges=merge_tables(), hole=st.integers(0, 20), text=st.text(alphabet="abc é你'", max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_merge_table(merges: list[tuple[str, str]], hole: int, text: str) -> None:
    """Merges in any order, pieces missing from the vocabulary: the engine "auto" chooses gives the defined ids."""
    names = dict.fromkeys([*reference_bpe.stand_ins().values(), *(a + b for a, b in merges)])
    vocab = {name: i for i, name in enumerate(name for i, name in enumerate(names) if i != 97 + hole)}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    engine, _ = bpe.build_engine("auto", vocab, ranks)
    expected = reference_bpe.encode(text, vocab, ranks)
    assert engine.encode(text).tolist() == expected
    assert bpe.PythonEngine(vocab, ranks).encode(text).tolist() == expected


def test_unordered_merges_need_the_exact_engine() -> None:
    vocab = {name: i for i, name in enumerate([*reference_bpe.stand_ins().values(), "ab", "abc"])}
    ranks = {("ab", "c"): 0, ("a", "b"): 1}
    assert bpe.build_engine("auto", vocab, ranks)[0].name == "python"
    with pytest.raises(FlagError, match=r"--bpe-engine gigatoken.*ranks a merge before"):
        bpe.build_engine("gigatoken", vocab, ranks)


def test_every_character_is_classified_as_by_regex() -> None:
    """Where the compiled engine's Unicode tables differ from those of `regex`, the text takes the exact way."""
    import gigatoken

    disputed = bpe._disputed_characters(gigatoken)
    words = regex.compile(bpe.PRETOKEN_PATTERN)
    for code in [*range(0x80, 0xD800, 3), *range(0xE000, 0x30000, 7), *disputed.nonzero()[0][:200].tolist()]:
        text = "a{0}b 1{0}2 !{0}? {0} {0}{0}".format(chr(code))
        split = [bytes(word).decode("utf-8") for word in gigatoken.pretokenizer(text.encode("utf-8"))]
        assert disputed[code] or split == words.findall(text), hex(code)


def test_cache_of_the_compiled_engine_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ENGINES["gigatoken"].engine
    assert isinstance(engine, bpe.GigatokenEngine)
    resident = iter([100 << 20, 400 << 20, 450 << 20, 500 << 20, 500 << 20])
    monkeypatch.setattr(bpe, "_resident_bytes", lambda: next(resident))
    engine._build()
    first = engine._tokenizer
    monkeypatch.setattr(engine, "CHECK_CHARACTERS", 10)
    before = engine.encode("some words of text").tolist()
    assert engine._tokenizer is not first
    assert engine.encode("short").tolist() and engine.encode("some words of text").tolist() == before


def test_one_very_long_word() -> None:
    word = "ab" * 60_000
    ranks = {("a", "b"): 0, ("ab", "ab"): 1, ("abab", "abab"): 2}
    assert bpe.merge_word(word, ranks) == ["abababab"] * 15_000


def test_lone_surrogates_are_refused() -> None:
    for tokenizer in ENGINES.values():
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode("a \ud800 b")


def test_last_merge_without_newline_is_dropped_with_a_warning(tmp_path: Path) -> None:
    merges = tmp_path / "merges.txt"
    merges.write_text("#version: 0.2\na b\nab c", encoding="utf-8")
    with pytest.warns(UserWarning, match="does not end with a newline.*'ab c'"):
        assert bpe.load_merges(str(merges)) == {("a", "b"): 0}
    merges.write_text("#version: 0.2\na b\nb c\na b\n", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bpe.load_merges(str(merges)) == {("a", "b"): 2, ("b", "c"): 1}


def test_vocabulary_without_end_of_text(tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.json"
    vocab.write_text(json.dumps({"a": 0}), encoding="utf-8")
    with pytest.raises(DataError, match=r"vocab.json: .*<\|endoftext\|>.*Fix: add"):
        _GPT2BPETokenizer(str(vocab), FILES[1])


def test_offsets_of_multibyte_characters() -> None:
    tokenizer = _GPT2BPETokenizer(*FILES)
    text = "a你😀b"
    ids = tokenizer.tokenize(text)
    widths = [len(tokenizer.tokenizer.token_bytes(token)) for token in ids]
    character_at_byte = [i for i, character in enumerate(text) for _ in character.encode("utf-8")]
    assert tokenizer.offsets(ids, text) == [character_at_byte[sum(widths[:i])] for i in range(len(ids))]
