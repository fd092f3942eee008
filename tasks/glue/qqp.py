"""QQP: do two questions ask the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.errors import DataError
from megatron.training.utils import print_rank_0
from tasks.data_utils import clean_text
from tasks.glue.data import GLUEAbstractDataset, refuse, report_count, rows_of

LABELS = (0, 1)
_COLUMNS, _TEST_COLUMNS = 6, 3


class QQPDataset(GLUEAbstractDataset):
    """Pairs of questions of files of the GLUE release; samples of test files get `test_label`."""

    def __init__(
        self, name: str, datapaths: Sequence[str], tokenizer: Any, max_seq_length: int, test_label: int = 0
    ) -> None:
        self.test_label = test_label
        super().__init__("QQP", name, datapaths, tokenizer, max_seq_length)

    def process_samples_from_single_path(self, datapath: str) -> list[dict[str, Any]]:
        """The samples of one file. The release has broken lines: outside test files they are named and left out."""
        print_rank_0(f" > Processing {datapath} ...")
        samples: list[dict[str, Any]] = []
        rows = rows_of(datapath)
        columns = len(next(rows, (1, []))[1])
        if columns not in (_COLUMNS, _TEST_COLUMNS):
            raise DataError(datapath, "its first line is not QQP's header", "give a file of the GLUE release")
        is_test = columns == _TEST_COLUMNS
        if is_test:
            print_rank_0(
                f"   reading id, question1, and question2 columns and setting labels to {self.test_label}"
            )
        else:
            print_rank_0("    reading id, question1, question2, and is_duplicate columns ...")
        for number, row in rows:
            defect = _defect(row, is_test)
            if defect is not None and is_test:
                raise refuse(datapath, number, defect)
            if defect is not None:
                print_rank_0(f"***WARNING*** {defect}, skipping: {row}")
                continue
            uid, text_a, text_b, label = _parts(row, self.test_label if is_test else None)
            if not uid.isdecimal() or label not in map(str, LABELS):
                raise refuse(datapath, number, f"id {uid!r} or label {label!r} is not one")
            samples.append({"uid": int(uid), "text_a": text_a, "text_b": text_b, "label": int(label)})
            report_count(len(samples), every=50000)
        report_count(len(samples))
        return samples


def _defect(row: list[str], is_test: bool) -> str | None:
    """What is wrong with a line, in v0.9's words."""
    if len(row) != (_TEST_COLUMNS if is_test else _COLUMNS):
        return "index error"
    _, text_a, text_b, _ = _parts(row, 0 if is_test else None)
    if not text_a:
        return "zero length a"
    return None if text_b else "zero length b"


def _parts(row: list[str], test_label: int | None) -> tuple[str, str, str, str]:
    """Id, the two cleaned questions and label of a line; test files have no label, and other columns."""
    first = 3 if test_label is None else 1
    label = row[5].strip() if test_label is None else str(test_label)
    return row[0].strip(), clean_text(row[first].strip()), clean_text(row[first + 1].strip()), label
