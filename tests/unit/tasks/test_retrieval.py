"""Answers in passages against recordings of v0.9; shares of questions by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.core.errors import DataError, FlagError
from tasks.orqa import evaluate_retrieval
from tasks.orqa.answers import has_answer
from tests.unit.tasks.support import RECORDED

CASES = json.loads((RECORDED.parent / "orqa" / "has_answer.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case["answers"]))
def test_recorded_answers(case: dict) -> None:
    assert has_answer(case["answers"], case["text"], case["match"]) == case["found"]


@pytest.mark.parametrize(
    ("answer", "text", "match", "found"),
    [
        ("cafe\u0301", "a CAFÉ by the sea", "string", True),
        ("cafe", "a café by the sea", "string", False),
        ("seven boats", "seven\u00a0\u200bboats", "string", True),
        ("seven boats", "seven, boats", "string", False),
        ("^second$", "first\nSECOND", "regex", True),
        ("two words", "words two", "string", False),
    ],
)
def test_answers(answer: str, text: str, match: str, found: bool) -> None:
    assert has_answer(["no such thing", answer], text, match) == found


def test_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found first, third and never, of 2, 3 and 1 passages."""
    texts = [["tea", "no"], ["no", "no", "Tea."], ["teapot"]]
    rows = [{"answers": ["tea"], "ctxs": [{"text": text} for text in found]} for found in texts]
    path = tmp_path / "retrieved"
    wanted = [
        "top k documents hits [1, 1, 2]",
        f"top k documents hits accuracy {[1 / 3, 1 / 3, 2 / 3]}",
        "top-1: 33.33",
        "top-5: 66.67",
    ]
    for text in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        path.write_text(text)
        evaluate_retrieval.main(["--retrieved", str(path), "--topk", "1", "5"])
        assert capsys.readouterr().out.splitlines() == wanted


def test_what_it_refuses(tmp_path: Path) -> None:
    path = tmp_path / "retrieved"
    good = '{"answers": ["a"], "ctxs": [{"text": "a"}]}\n'
    for text, reason in (
        (good + "none", "retrieved:2: not JSON"),
        (good + '{"answers": ["a"]}', "retrieved:2: not a question"),
        ('[{"answers": [1], "ctxs": []}]', "question 0: its answers"),
        ('[{"answers": ["a"], "ctxs": []}]', "no passages"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=reason):
            evaluate_retrieval.main(["--retrieved", str(path)])
    with pytest.raises(FlagError, match="--topk: 0 passages"):
        evaluate_retrieval.main(["--retrieved", str(path), "--topk", "0"])
