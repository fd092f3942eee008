"""The algorithms against plain ones: n-grams, groups, hashes, similarities, URLs."""

from __future__ import annotations

import itertools
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.openwebtext.support import Call, documents, write
from tools.openwebtext import (
    blacklist_urls,
    cleanup_fix_dataset,
    filter_ngrams,
    find_duplicates,
    group_duplicate_url,
    remove_group_duplicates,
)

# Few words, so that n-grams occur; double spaces, cut words, and a capital that becomes two characters.
TEXTS = st.lists(
    st.sampled_from(["a", "b", "B", "c", "d", "ab", "İ", " ", "  ", ". ", "! ", "?", ", ", "\n"]), max_size=60
).map(lambda parts: "".join(part if part[-1] in " .!?,\n" else part + " " for part in parts))


def plain_words(text: str) -> tuple[list[str], list[int]]:
    """Words and starts, one character after the other."""
    lowered = [(low, at) for at, character in enumerate(text) for low in character.lower()]
    words: list[str] = []
    starts: list[int] = []
    for number, (low, at) in enumerate(lowered):
        if re.fullmatch(r"\w", low):
            if number and re.fullmatch(r"\w", lowered[number - 1][0]):
                words[-1] += low
            else:
                words.append(low)
                starts.append(at)
    return words, starts


def plain_match(text: str, ngrams: set[str], longest: int) -> tuple[int, str] | None:
    """(character, n-gram) of the first match, by the rule as it is written down."""
    words, starts = plain_words(text)
    lengths = sorted({len(ngram.split()) for ngram in ngrams})
    for first in range(len(words) - longest + 1):
        for length in [longest, *lengths]:
            if " ".join(words[first : first + length]) in ngrams:
                return starts[first], " ".join(words[first : first + length])
    if len(words) > longest:
        for length in lengths:
            for first in range(len(words) - longest, len(words) - length + 1):
                if length != longest and " ".join(words[first : first + length]) in ngrams:
                    return starts[first], " ".join(words[first : first + length])
    return None


def plain_occurrences(text: str, ngrams: set[str], longest: int) -> set[str]:
    match = plain_match(text, ngrams, longest)
    if match is None:
        return set()
    return {match[1]} | plain_occurrences(text[match[0] + len(match[1]) + 1 :], ngrams, longest)


def plain_pieces(text: str, ngrams: set[str], longest: int, margin: int, limit: int) -> list[str]:
    match = plain_match(text, ngrams, longest)
    if match is None:
        return [text]
    at, ngram = match
    before = [place for place, character in enumerate(text) if character in ".!?" and place <= at - margin]
    after = [
        place
        for place, character in enumerate(text)
        if character in ".!?" and place >= at + len(ngram) + margin
    ]
    first = text[: before[-1] + 1] if before else ""
    second = text[after[0] + 1 :] if after else ""
    pieces = [first] if len(first) > limit else []
    return pieces + (plain_pieces(second, ngrams, longest, margin, limit) if len(second) > limit else [])


@settings(max_examples=400, deadline=None)
@given(
    text=TEXTS,
    sources=st.lists(TEXTS, max_size=4),
    shortest=st.integers(1, 3),
    more=st.integers(0, 2),
    margin=st.integers(0, 6),
    limit=st.integers(0, 8),
)
def test_ngrams(text: str, sources: list[str], shortest: int, more: int, margin: int, limit: int) -> None:
    longest = shortest + more
    found: set[str] = set()
    for source in sources:
        words = plain_words(source)[0]
        if len(words) >= longest:
            found |= {" ".join(words[at : at + longest]) for at in range(len(words) - longest + 1)}
        elif len(words) >= shortest:
            found.add(" ".join(words))
    assert {n for source in sources for n in filter_ngrams.ngrams_of(source, shortest, longest)} == found
    ngrams = filter_ngrams.Ngrams(found, longest)
    assert ngrams.occurring(text) == plain_occurrences(text, found, longest)
    splitter = filter_ngrams.Splitter(ngrams, margin, limit)
    assert splitter.pieces(text) == plain_pieces(text, found, longest, margin, limit)


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(st.lists(st.integers(0, 15).map(str), min_size=1, max_size=3), max_size=12))
def test_groups_are_connected(lines: list[list[str]]) -> None:
    """Members are those that a walk along the lines reaches."""
    groups = group_duplicate_url.Groups()
    for urls in lines:
        groups.add(urls)
    members = groups.members()
    met = list(dict.fromkeys(url for urls in lines for url in urls))
    expected = []
    for url in met:
        reached = {url}
        for _ in lines:
            reached |= {other for urls in lines if reached & set(urls) for other in urls}
        if len(reached) > 1:
            expected.append([other for other in met if other in reached])
    assert sorted(members.values()) == sorted(group for group, _ in itertools.groupby(sorted(expected)))


def rewritten(text: str, share: float, draw: random.Random) -> str:
    words = text.split()
    for place in draw.sample(range(len(words)), int(share * len(words))):
        words[place] = "".join(draw.choices("abcdefghijklmnopqrstuvwxyzé", k=6))
    return " ".join(words)


def corpus(count: int, draw: random.Random) -> list[dict[str, str]]:
    """Random texts, every third with two versions of it."""
    rows = []
    for number in range(count):
        text = rewritten(" ".join("w" * draw.randint(60, 200)), 1.0, draw)
        rows.append({"url": f"u{number}", "text": text})
        if number % 3 == 0:
            rows.append({"url": f"near{number}", "text": rewritten(text, 0.02, draw)})
            rows.append({"url": f"same{number}", "text": text})
    draw.shuffle(rows)
    return rows


def test_hashes_agree_as_often_as_shingles() -> None:
    """Agreement is a sum of coins of probability J: over 60 pairs it misses the exact J by what such coins do."""
    draw, coins = random.Random(3), 500
    hasher = find_duplicates.fingerprints.MinHasher(coins, 10, 1)
    misses = []
    for share in (0.05, 0.1, 0.2):
        for _ in range(20):
            one = rewritten(" ".join("w" * 300), 1.0, draw)
            other = rewritten(one, share, draw)
            sets = [
                {text.encode()[at : at + 5] for at in range(len(text.encode()) - 4)} for text in (one, other)
            ]
            exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
            agreement = (hasher.fingerprint(one) == hasher.fingerprint(other)).mean()
            misses.append((agreement - exact) / np.sqrt(exact * (1 - exact) / coins))
    assert abs(np.mean(misses)) < 4 / np.sqrt(len(misses)) and 0.7 < np.std(misses) < 1.3


def test_bands_are_compared_whole() -> None:
    hasher = find_duplicates.fingerprints.MinHasher(6, 3, 1)
    one = np.array([1, 2, 3, 4, 5, 6], np.uint32)
    other = np.array([1, 2, 4, 3, 5, 7], np.uint32)
    assert (hasher.band_keys(one) == hasher.band_keys(other)).tolist() == [True, False, False]
    keys = np.array([5, 9, 5, 7, 9, 5], np.uint64)
    assert [bucket.tolist() for bucket in find_duplicates.buckets(keys)] == [[0, 2, 5], [1, 4]]
    assert hasher.fingerprint("four") is None and hasher.fingerprint("fiver") is not None


@pytest.mark.parametrize("flags", [("--heuristic-iter", "1"), ("--heuristic-iter", "-1", "--jaccard", "max")])
def test_near_duplicates_are_found(call: Call, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Every pair has the similarity of a plain comparison, and groups are the families the texts came from."""
    rows = corpus(60, random.Random(5))
    data, pairs, groups = write(tmp_path / "data", rows), tmp_path / "pairs", tmp_path / "groups"
    call(find_duplicates, "--inputs", data, "url", "--output", pairs, *flags)
    texts = {row["url"]: row["text"] for row in rows}
    for row in documents(pairs):
        for main, others in row.items():
            for other, similarity in (item for found in others for item in found.items()):
                sets = [
                    {texts[url][at : at + 5] for at in range(len(texts[url]) - 5)} for url in (main, other)
                ]
                whole = max(map(len, sets)) if "max" in flags else len(sets[0] | sets[1])
                assert (
                    similarity == pytest.approx(len(sets[0] & sets[1]) / whole, rel=1e-12)
                    and similarity > 0.5
                )
    call(group_duplicate_url, pairs, groups)
    found = sorted(sorted(urls) for row in documents(groups) for urls in row.values())
    assert found == sorted([f"near{n}", f"same{n}", f"u{n}"] for n in range(0, 60, 3))
    call(remove_group_duplicates, groups, data, tmp_path / "left")
    left = [row["url"] for row in documents(tmp_path / "left")]
    assert sorted(int(re.sub(r"\D", "", url)) for url in left) == list(range(60))


def test_fingerprints_in_parts_give_the_same(call: Call, tmp_path: Path) -> None:
    rows = corpus(30, random.Random(7))
    whole = write(tmp_path / "whole", rows)
    call(find_duplicates, "--inputs", whole, "url", "--output", tmp_path / "pairs", "--heuristic-iter", "-1")
    for name, part in (("a", rows[:20]), ("b", rows[20:])):
        inputs = ("--inputs", write(tmp_path / name, part), "url")
        call(find_duplicates, *inputs, "--save-fingerprints", tmp_path / f"{name}.pkl")
    parts = ("--load-fingerprints", tmp_path / "a.pkl", tmp_path / "b.pkl")
    call(find_duplicates, *parts, "--output", tmp_path / "joined", "--heuristic-iter", "-1")
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "pairs").read_bytes()
    # An id that comes again is the same document.
    again = call(
        find_duplicates,
        *parts,
        "--inputs",
        whole,
        "url",
        "--output",
        tmp_path / "again",
        "--heuristic-iter",
        "-1",
    )
    assert f" {len(rows)} documents have the id of another one and are left out" in again
    assert (tmp_path / "again").read_bytes() == (tmp_path / "pairs").read_bytes()


LABEL = "a" * 63


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("https://example.org/a", None),
        ("http://example.org?q=1", None),
        ("http://example.org.:80/", None),
        ("http://10.0.0.1:8080?x", None),
        (f"http://{LABEL}.org/", None),
        ("http://x.a-/", None),
        (f"http://{LABEL}a.org/", "MALFORMED URL"),
        ("http://-a.org/", "MALFORMED URL"),
        ("http://a-.org/", "MALFORMED URL"),
        ("http://a..org/", "MALFORMED URL"),
        ("http://a_b.org/", "MALFORMED URL"),
        ("http://example.org:/", "MALFORMED URL"),
        ("http://example.org?", "MALFORMED URL"),
        ("http://example.org#top", "MALFORMED URL"),
        ("http://1.2.3/x", "MALFORMED URL"),
        ("http://bücher.example/", "MALFORMED URL"),
        ("https://example.org/\udcff", "MALFORMED URL"),
        ("http://seen.org/", "DUPLICATE URL"),
        ("a.org/x", "SHORT URL"),
        ("https://example.org/a.TAR.GZ?b", "EXTENTION BLACKLIST"),
        ("x.pdf", "EXTENTION BLACKLIST"),
        ("https://WWW.Reddit.Com/a.pdf", "DOMAIN BLACKLIST"),
        ("http://my-amazon.co.jp/", None),
        ("http://amazon.example.org/", None),
    ],
)
def test_rules_of_urls(url: str, rule: str | None) -> None:
    assert blacklist_urls.first_rule(url, {"http://seen.org/"}) == rule


def test_ends_of_lines() -> None:
    """general_cleaning: only after a word, with one space that follows."""
    texts = {
        "a\n\n b": "a b",
        "a.\n b": "a.\n b",
        "a\n  b": "a  b",
        "a \n b": "a \n b",
        "  a": " a",
        "é\nb": "é b",
    }
    assert [cleanup_fix_dataset.act("general_cleaning", text)[1] for text in texts] == list(texts.values())


def test_texts_of_the_hub(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task's split and key, with a package that says what it was asked for."""
    asked = []
    question = "which seven boats left the old harbour before dawn"
    row = {"question": question, "goal": question, "questions": ["why", question]}

    class Hub:
        @staticmethod
        def load_dataset(*names: str, split: str) -> list[dict]:
            asked.append((*names, split))
            return [{**row, "question": {"text": question}} if names[0] == "natural_questions" else row]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    text = f"Nobody knew {question.title()}. The rest stays as it is."
    data = write(tmp_path / "data", [{"body": text, "n": 1}])
    for task in filter_ngrams.TASKS[1:]:
        flags = ("--filter-text-char-len", "5", "--remove-char-each-side", "0", "--output", tmp_path / "out")
        call(filter_ngrams, "--tasks", task, "--dedup-dataset", data, "body", *flags)
        split_id = f"{task}-0000000001-0000"
        assert documents(tmp_path / "out") == [
            {"body": " The rest stays as it is.", "n": 1, "split_id": split_id}
        ]
    assert asked == [
        ("squad_v2", "validation"),
        ("natural_questions", "validation"),
        ("trivia_qa", "unfiltered", "test"),
        ("web_questions", "test"),
        ("race", "all", "test"),
        ("drop", "validation"),
        ("coqa", "validation"),
        ("piqa", "test"),
    ]


def test_ordinary_phrases_stay(call: Call, tmp_path: Path) -> None:
    """An n-gram counts once for a document, however often it is in it."""
    phrase = "one two three"
    write(tmp_path / "lambada", [{"text": phrase}])
    data = write(tmp_path / "data", [{"text": f"{phrase} and {phrase}. tail"}, {"text": f"x {phrase}"}])
    flags = ("--min-ngram-size", "3", "--max-ngram-size", "3", "--filter-text-char-len", "0")
    words = (
        "--tasks",
        "lambada",
        "--lambada-path",
        tmp_path / "lambada",
        "--dedup-dataset",
        data,
        "text",
        *flags,
    )
    for threshold, left in (("2", 2), ("3", 0)):
        lines = call(filter_ngrams, *words, "--output", tmp_path / "out", "--key-threshold", threshold)
        assert len(documents(tmp_path / "out")) == left
        assert (f" [threshold] {phrase} 2" in lines) == (left == 0)
