"""The scripts against recordings of v0.9: files, printed lines, command lines."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import pytest
import regex

from tests.unit.openwebtext.support import RECORDED, Call, documents, expected
from tests.unit.tasks.support import tokenizer
from tools.openwebtext import (
    add_id,
    blacklist_urls,
    cleanup_dataset,
    cleanup_fix_dataset,
    filter_ngrams,
    find_duplicates,
    group_duplicate_url,
    group_duplicate_urls,
    merge_jsons,
    remove_group_duplicates,
)


def test_urls(call: Call, tmp_path: Path) -> None:
    """`.7z` and `.ai` count, which v0.9 had fused into one extension."""
    lines = call(blacklist_urls, RECORDED / "urls", tmp_path / "out")
    recorded = expected("expected_urls.json")
    fused = [["EXTENTION BLACKLIST", f"https://example.org/{name}"] for name in ("archive.7z", "art.ai")]
    rejected = [[line[1:].partition("]")[0], line.partition(": ")[2]] for line in lines[:-1]]
    assert sorted(rejected) == sorted(recorded["rejected"] + fused)
    kept = (tmp_path / "out").read_text().splitlines()
    assert sorted(kept) == [url for url in recorded["kept_sorted"] if not url.endswith((".7z", ".ai"))]
    assert lines[-1] == recorded["final_line"].replace("extention blacklisted: 4", "extention blacklisted: 6")


def test_first_cleaning(call: Call, tmp_path: Path) -> None:
    lines = call(cleanup_dataset, RECORDED / "cleanup_in.jsonl", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (RECORDED / "cleanup_out.jsonl").read_bytes()
    assert lines[-1] == expected("cleanup_expected.json")["final_line"]
    assert lines[:-1] == [f"    skipping {RECORDED}/cleanup_in.jsonl:6: it has no 'text'."]


def test_tokens_are_those_of_gpt2(call: Call, tmp_path: Path) -> None:
    """With a vocabulary they are counted as the training's tokenizer does, else as GPT-2's own pattern does."""
    vocabulary = RECORDED.parent / "tasks" / "vocab"
    files = (str(vocabulary / "gpt-vocab.json"), str(vocabulary / "gpt-merges.txt"))
    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    texts = ["The keeper's boats, 7 of them_all  came   back\n\n at dawn ... we'll see! ", "", "  é ü ß 1,5"]
    texts += [document["text"] for document in documents(RECORDED / "dup_docs.jsonl")]
    for text in texts:
        count = cleanup_dataset.token_counter(*files)(text)
        assert count == len(tokenizer("gpt").tokenize(text))
        assert cleanup_dataset.token_counter(None, None)(text) == len(pattern.findall(text)) <= count
    flags = ("--vocab-file", files[0], "--merge-file", files[1])
    lines = call(cleanup_dataset, RECORDED / "cleanup_in.jsonl", tmp_path / "out", *flags)
    assert lines[-1].endswith(
        "| small docs: 0 | small docs chars: 0"
    )  # so small a vocabulary gives many tokens


@pytest.mark.parametrize("case", expected("fix_expected.json"), ids=lambda case: "-".join(case["tasks"]))
def test_second_cleaning(call: Call, tmp_path: Path, case: dict) -> None:
    tasks = reversed(case["tasks"])  # their order on the command line does not count
    words = ("--input-files", RECORDED / "fix_in.jsonl", "--output-path", tmp_path, "--tasks", *tasks)
    assert call(cleanup_fix_dataset, *words)[-1] == case["summary"]
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == case["files"]


@pytest.mark.parametrize("case", expected("jaccard.json"), ids=lambda case: case["a"])
def test_similarity(case: dict) -> None:
    one, other = find_duplicates.shingles(case["a"]), find_duplicates.shingles(case["b"])
    assert (sorted(one), sorted(other)) == (case["shingles_a"], case["shingles_b"])
    for kind in ("union", "min", "max"):
        assert find_duplicates.jaccard(one, other, kind) == pytest.approx(case[kind], rel=1e-12)


@pytest.mark.parametrize("case", expected("dup_expected.json"))
def test_near_duplicates(call: Call, tmp_path: Path, case: dict) -> None:
    pairs, groups = tmp_path / "pairs", tmp_path / "groups"
    flags = ("--jaccard", case["jaccard"], "--heuristic-iter", case["heuristic_iter"])
    call(find_duplicates, "--inputs", RECORDED / "dup_docs.jsonl", "url", "--output", pairs, *flags)
    call(group_duplicate_url, pairs, groups)
    found = sorted(sorted(urls) for row in documents(groups) for urls in row.values())
    assert found == case["groups_after_group_duplicate_url_default_threshold"]


@pytest.mark.parametrize("case", expected("group_expected.json"), ids=lambda case: str(case["threshold_arg"]))
@pytest.mark.parametrize("script", [group_duplicate_url, group_duplicate_urls])
def test_groups(call: Call, tmp_path: Path, script: object, case: dict) -> None:
    lines = call(script, RECORDED / "group_in.jsonl", tmp_path / "out", *case["threshold_arg"])
    assert lines == [case["summary"]]
    written = {index: sorted(urls) for row in documents(tmp_path / "out") for index, urls in row.items()}
    assert written == case["groups"]


def test_removal(call: Call, tmp_path: Path) -> None:
    words = (RECORDED / "remove_groups.jsonl", RECORDED / "remove_in.jsonl", tmp_path / "out")
    lines = call(remove_group_duplicates, *words)
    assert (tmp_path / "out").read_bytes() == (RECORDED / "remove_out.jsonl").read_bytes()
    assert lines[-1] == expected("remove_expected.json")["last_processed_line"]
    assert lines[0] == "will be removing 3 urls"
    assert [line for line in lines if line.startswith("removing")] == [
        "removing b",
        "removing e",
        "removing f",
    ]
    assert f"[SKIPPING] {RECORDED}/remove_in.jsonl:5: it has no 'url'." in lines


def test_numbers(call: Call, tmp_path: Path) -> None:
    words = ("--input-file", RECORDED / "addid_in.jsonl", "--output-file", tmp_path / "out")
    call(add_id, *words, "--id-prefix", "cc")
    assert (tmp_path / "out").read_bytes() == (RECORDED / "addid_out.jsonl").read_bytes()


@pytest.mark.parametrize("case", expected("ngram_expected.json"), ids=lambda case: str(len(case["args"])))
def test_evaluation_texts(call: Call, tmp_path: Path, case: dict) -> None:
    lambada = ("--tasks", "lambada", "--lambada-path", RECORDED / "ngram_lambada.jsonl")
    words = (
        "--dedup-dataset",
        RECORDED / "ngram_in.jsonl",
        "text",
        "--output",
        tmp_path / "out",
        *case["args"],
    )
    lines = call(filter_ngrams, *lambada, *words, "--save-dictionary", tmp_path / "kept")
    assert lines[1:] == case["stdout_lines"]
    assert (tmp_path / "out").read_text() == case["output"]
    (tmp_path / "out").unlink()
    lines = call(filter_ngrams, "--tasks", "lambada", *words, "--load-dictionary", tmp_path / "kept")
    assert lines[1:] == case["stdout_lines"][-3:]
    assert (tmp_path / "out").read_text() == case["output"]


@pytest.mark.parametrize(
    "script",
    [add_id, cleanup_fix_dataset, filter_ngrams, find_duplicates, merge_jsons],
    ids=lambda s: s.__name__,
)
def test_command_lines(script: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recorded flag parses the same, and there are no others."""
    name = script.__name__.rpartition(".")[2]
    with (RECORDED / "flags.tsv").open(newline="") as file:
        rows = [
            {key: row[key] for key in ("flags", "dest", "type", "nargs", "default", "choices")}
            | {"required": row["required"], "kind": row["kind"]}
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if row["parser"] == f"openwebtext_{name}"
        ]

    class Parsed(Exception):
        """Ends `main` once the parser is complete."""

    def capture(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", capture)
    with pytest.raises(Parsed) as stopped:
        script.main()
    ours = [
        {
            "flags": ",".join(action.option_strings),
            "dest": action.dest,
            "type": action.type.__name__ if action.type else "",
            "nargs": str(action.nargs or "") if action.nargs != 0 else "",
            "default": repr(action.default),
            "choices": repr(action.choices) if action.choices else "",
            "required": str(action.required),
            "kind": "store_true" if action.nargs == 0 else "store",
        }
        for action in stopped.value.args[0]._actions
        if action.dest != "help"
    ]
    for row in rows:  # the recording names the type of texts, argparse does not
        row["type"] = row["type"].replace("str", "")
    assert ours == rows and sys.argv
