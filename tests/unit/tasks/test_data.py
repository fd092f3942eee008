"""The data sets of the tasks against recordings of v0.9: cleaning, packing, samples, printed lines, reports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron.core.errors import DataError
from tasks import data_utils
from tasks.glue import finetune as glue
from tasks.glue.mnli import MNLIDataset
from tasks.glue.qqp import QQPDataset
from tasks.race import finetune as race
from tasks.race.data import RaceDataset
from tasks.zeroshot_gpt import detokenizer, evaluate
from tasks.zeroshot_gpt.datasets import LambadaDataset, LMDataset
from tests.unit.tasks.support import RECORDED, expected, tokenizer


@pytest.fixture(autouse=True)
def _among_the_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded lines name paths relative to there."""
    monkeypatch.chdir(RECORDED)


def plain(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, int) else value.tolist() for key, value in sample.items()}


def test_cleaning() -> None:
    for pair in expected("text/clean_text.json"):
        assert data_utils.clean_text(pair["in"]) == pair["out"], pair


def test_packing() -> None:
    for case in expected("text/pack_pair.json"):
        packed = data_utils.build_tokens_types_paddings_from_ids(
            case["a_ids"], case["b_ids"], case["max_seq_length"], case["cls"], case["sep"], case["pad"]
        )
        assert list(packed) == [case["ids"], case["types"], case["paddings"]], case


@pytest.mark.parametrize(("task", "dataset"), [("MNLI", MNLIDataset), ("QQP", QQPDataset)])
def test_sentence_pairs(task: str, dataset: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for case in expected(f"glue/{task}/expected.json"):
        built = dataset("training", case["files"], tokenizer("bert"), case["max_seq_length"])
        assert capsys.readouterr().out.splitlines() == case["log"]
        assert built.samples == case["raw"]
        assert [plain(built[i]) for i in range(len(built))] == case["samples"]


def test_race() -> None:
    for case in expected("race/expected.json"):
        lengths = case["max_seq_length"], case["max_qa_length"]
        built = RaceDataset("training", case["dirs"], tokenizer("bert"), *lengths)
        samples = [plain(built[i]) for i in range(len(built))]
        assert sorted(sample.pop("uid") for sample in samples) == case["uids"]
        by_text = sorted(case["samples_sorted_by_text"], key=lambda sample: sample["text"])
        assert sorted(samples, key=lambda sample: sample["text"]) == by_text
        assert built.sample_multiplier == case["sample_multiplier"]


def test_names_of_reports() -> None:
    for case in expected("glue/dataset_names.json"):
        task, path = case["task"], case["path"]
        name = race.dataset_name(path) if task == "RACE" else glue.dataset_name(task, path)
        assert name == case["name_if_only_the_suffix_is_removed"], path


def test_detokenizers() -> None:
    recorded = expected("text/detokenizer.json")
    named = {
        "ptb": detokenizer.ptb_detokenizer,
        "wiki": detokenizer.wikitext_detokenizer,
        "lambada": detokenizer.lambada_detokenizer,
    }
    for case in recorded["cases"]:
        assert named[case["detokenizer"]](case["in"]) == case["out"], case
    for case in recorded["selected_by_path"]:
        if case["detokenizer"] is None:
            with pytest.raises(DataError, match="rename the file"):
                detokenizer.get_detokenizer(case["path"])
        else:
            assert detokenizer.get_detokenizer(case["path"]) is named[case["detokenizer"]], case
    # A directory called after another corpus does not decide.
    assert detokenizer.get_detokenizer("/data/wiki/ptb.test.txt") is named["ptb"]
    assert detokenizer.get_detokenizer("/data/ptb/wiki.test.tokens") is named["wiki"]


def test_wikitext_windows() -> None:
    text = Path("zeroshot/wiki.test.tokens").read_text(encoding="utf-8")
    for case in expected("zeroshot/expected_wikitext.json"):
        detokenized = detokenizer.get_detokenizer("wiki.test.tokens")(text)
        assert detokenized == case["detokenized"]
        tokens = tokenizer("gpt").tokenize(detokenized)
        assert tokens == case["tokens"] and len(text.strip().split(" ")) == case["num_original_tokens"]
        length = case["seq_length"]
        built = LMDataset(
            tokens,
            length,
            tokenizer("gpt").eod,
            case["num_original_tokens"],
            len(tokens),
            case["overlapping_eval"],
        )
        assert len(built) == case["len"]
        assert [plain(built[i]) for i in range(len(built))] == case["samples"]
        counted = sum(int(built[i]["pad_mask"].sum()) for i in range(len(built)))
        assert counted == len(tokens) - 1 or case["overlapping_eval"] > length  # every prediction counts once


def test_lambada() -> None:
    for case in expected("zeroshot/expected_lambada.json"):
        built = LambadaDataset(
            "zeroshot/lambada_test.jsonl",
            case["pad_id"],
            tokenizer("gpt"),
            case["seq_length"],
            case["strict"],
        )
        assert (built.tokens, built.labels) == (case["tokens"], case["labels"])
        assert [plain(built[i]) for i in range(len(built))] == case["samples"]


def test_final_reports() -> None:
    for case in expected("zeroshot/report_lines.json"):
        if case["task"] == "LAMBADA":
            dataset: Any = range(case["n"])
        else:
            counts = case["num_original_tokens"], case["num_tokenized_tokens"]
            dataset = LMDataset([0], 8, 0, *counts)
        lines = evaluate.results(case["task"], case["total"], dataset)
        assert "".join(f"{line}\n" for line in lines) == case["stdout"]


BROKEN = [
    (MNLIDataset, "\t".join("abcdefghijkl") + "\n" + "\t".join("0bcdefgh") + "\n", "line 2: it has 8 columns"),
    (MNLIDataset, "\t".join("abcdefghijkl") + "\n" + "\t".join("0bcdefghij") + "\tk\tmaybe\n", "'maybe' is none of"),
    (MNLIDataset, "\t".join("abcdefghijkl") + "\n" + "\t".join("xbcdefghij") + "\tk\tneutral\n", "'x' is not the index"),
    (MNLIDataset, "id\tquestion\n", "not MNLI's header"),
    (QQPDataset, "id\tq1\tq2\n0\tone\n", "line 2: index error"),
    (QQPDataset, "\t".join("abcdef") + "\n0\t1\t2\tone\ttwo\t5\n", "label '5'"),
    (QQPDataset, "a\tb\n", "not QQP's header"),
]  # fmt: skip


@pytest.mark.parametrize(("dataset", "text", "reason"), BROKEN)
def test_broken_pairs_are_named(tmp_path: Path, dataset: Any, text: str, reason: str) -> None:
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(DataError, match=re.escape(reason)):
        dataset("training", [str(tmp_path / "train.tsv")], tokenizer("bert"), 16)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "it is no document of RACE"),
        ('{"article": "a", "questions": ["q"], "options": [], "answers": ["A"]}', "differ in number"),
        ('{"article": "a", "questions": ["q"], "options": [["1", "2"]], "answers": ["A"]}', "2 choices"),
        (
            '{"article": "a", "questions": ["q"], "options": [["1", "2", "3", "4"]], "answers": ["E"]}',
            "answer 'E'",
        ),
        (None, "it holds no .txt file"),
    ],
)
def test_broken_documents_are_named(tmp_path: Path, line: str | None, reason: str) -> None:
    if line is not None:
        (tmp_path / "1.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=reason):
        RaceDataset("training", [str(tmp_path)], tokenizer("bert"), 16)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "no JSON with a text"),
        ('{"text": "word"}', "nothing is left"),
        ('{"text": "a b c d e f g h i"}', "raise --seq-length"),
    ],
)
def test_broken_texts_are_named(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "lambada.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=reason):
        LambadaDataset(str(tmp_path / "lambada.jsonl"), 0, tokenizer("gpt"), 4, strict=True)
