"""WordPiece against HuggingFace's implementations and against its own character-by-character form."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.errors import DataError
from megatron.training.tokenizer import word_table
from megatron.training.tokenizer.bert_tokenization import FullTokenizer, _BertWordPieceTokenizer
from tests.unit.tokenizer.hostile import hostile_text

VOCAB = Path(__file__).parents[2] / "golden" / "data" / "vocab"
FILES = {True: str(VOCAB / "bert-vocab.txt"), False: str(VOCAB / "bert-cased-vocab.txt")}
OURS = {lower: FullTokenizer(path, do_lower_case=lower) for lower, path in FILES.items()}
STABLE = 0x2FF  # category tables of different Unicode versions agree below


@pytest.mark.parametrize("lower", [True, False])
@given(text=hostile_text)
@settings(max_examples=200, deadline=None)
def test_word_lookup_equals_the_steps(lower: bool, text: str) -> None:
    tokenizer = OURS[lower]
    words = tokenizer.basic_tokenizer.spelled_words(text)
    assert tokenizer.basic_tokenizer.tokenize(text) == ["".join(c for c, _ in word) for word in words]
    assert tokenizer.encode(text).tolist() == tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))


@pytest.mark.parametrize("lower", [True, False])
@given(text=hostile_text)
@settings(max_examples=200, deadline=None)
def test_ids_are_those_of_the_rust_tokenizer(lower: bool, text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    if any(ord(c) > STABLE and not 0x4E00 <= ord(c) <= 0x9FA5 for c in text) or "\x85" in text:
        return
    rust = tokenizers.Tokenizer(
        tokenizers.models.WordPiece.from_file(FILES[lower], unk_token="[UNK]", max_input_chars_per_word=200)
    )
    rust.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower)
    rust.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    assert OURS[lower].encode(text).tolist() == rust.encode(text).ids


@pytest.mark.parametrize("crowded", [False, True])
@given(
    texts=st.lists(st.text(alphabet="aB9ing.,-_'[]# \t\n\r", max_size=600), max_size=6),
    repeats=st.integers(1, 9),
)
@settings(max_examples=100, deadline=None)
def test_long_ascii_texts_give_the_ids_of_their_words(crowded: bool, texts: list[str], repeats: int) -> None:
    """Also with a table that is too small, so that words share slots and everything is forgotten now and then."""
    with pytest.MonkeyPatch.context() as patch:
        if crowded:
            for name, value in (
                ("SLOT_BITS", 3),
                ("LAST_SLOT", 7),
                ("MAX_WORDS", 9),
                ("BLOCK_CHARACTERS", 50),
            ):
                patch.setattr(word_table, name, value)
        tokenizer = FullTokenizer(FILES[False], do_lower_case=False)
        table = word_table.AsciiWordTable(tokenizer._ids_of_word)
        for text in [*texts, "playing unaffable " * 40, "a" * 16 + "b " + "a" * 16 + "c", ""]:
            steps = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text * repeats))
            assert table.ids(text * repeats).tolist() == steps
            assert tokenizer.encode(text * repeats).tolist() == steps


def test_pieces_are_the_longest_that_fit() -> None:
    """Against the plain search from the end of the word, also for tokens that were added later."""
    tokenizer = _BertWordPieceTokenizer(FILES[True], vocab_extra_ids=3).tokenizer
    pieces, vocab = tokenizer.wordpiece_tokenizer.pieces, tokenizer.vocab
    words = {text for token in vocab for text in (token, token[::-1], token + "ing", "##" + token)}
    for word in sorted(words):
        expected: list[str] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = [end for end in range(len(word), start, -1) if prefix + word[start:end] in vocab]
            if not ends:
                expected = ["[UNK]"]
                break
            expected.append(prefix + word[start : ends[0]])
            start = ends[0]
        assert pieces(word) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ΣΑΣ ΑΣ", ["σας", "ας"]),  # the last sigma of a word has its own form
        ("İx", ["ix"]),  # lower-casing gives two characters
        ("a\x0bb\x85c \x1cd", ["abc", "d"]),  # controls vanish; they do not separate
        ("a\u2028b", ["a", "b"]),
        ("x\u0301y", ["xy"]),
        ("漢字kana", ["漢", "字", "kana"]),
    ],
)
def test_basic_tokenization(text: str, words: list[str]) -> None:
    assert OURS[True].basic_tokenizer.tokenize(text) == words


def test_vocabulary_rules(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n\n[CLS]\n[SEP]\n[MASK]\nw\nw\n[BOS]\n", encoding="utf-8")
    tokenizer = _BertWordPieceTokenizer(str(path), vocab_extra_ids=2)
    assert tokenizer.vocab["w"] == 7 and tokenizer.bos == 8
    assert tokenizer.eos == 8 and tokenizer.vocab_size == 11  # 8 distinct lines, then [EOS] and two sentinels
    assert tokenizer.additional_special_tokens == ["<extra_id_0>", "<extra_id_1>"]
    path.write_text("[PAD]\n[CLS]\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"vocab.txt: the vocabulary lacks \[SEP\] \[MASK\]"):
        _BertWordPieceTokenizer(str(path))
    path.write_text("[PAD]\n[CLS]\n[SEP]\n[MASK]\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"needs \[UNK\]"):
        _BertWordPieceTokenizer(str(path)).tokenize("unknown")
