"""MNLI: does one sentence follow from another, contradict it, or neither (Williams et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.errors import DataError
from megatron.training.utils import print_rank_0
from tasks.data_utils import clean_text
from tasks.glue.data import GLUEAbstractDataset, refuse, report_count, rows_of

LABELS = {"contradiction": 0, "entailment": 1, "neutral": 2}
#: Columns of a test file, which has no labels.
_TEST_COLUMNS = 10


class MNLIDataset(GLUEAbstractDataset):
    """Premise and hypothesis of files of the GLUE release; samples of test files get `test_label`."""

    def __init__(
        self,
        name: str,
        datapaths: Sequence[str],
        tokenizer: Any,
        max_seq_length: int,
        test_label: str = "contradiction",
    ) -> None:
        self.test_label = test_label
        super().__init__("MNLI", name, datapaths, tokenizer, max_seq_length)

    def process_samples_from_single_path(self, datapath: str) -> list[dict[str, Any]]:
        """The samples of one file; DataError for a line without texts, a label or an index."""
        print_rank_0(f" > Processing {datapath} ...")
        samples: list[dict[str, Any]] = []
        rows = rows_of(datapath)
        header = next(rows, (1, []))[1]
        if len(header) < _TEST_COLUMNS:
            raise DataError(
                datapath, "its first line is not MNLI's header", "give a file of the GLUE release"
            )
        is_test = len(header) == _TEST_COLUMNS
        if is_test:
            print_rank_0(
                f"   reading index, sentence1 and sentence2 columns and setting labels to {self.test_label}"
            )
        else:
            print_rank_0("    reading index , sentence1, sentence2, and gold_label columns ...")
        for number, row in rows:
            if len(row) < _TEST_COLUMNS:
                raise refuse(datapath, number, f"it has {len(row)} columns")
            text_a, text_b = clean_text(row[8].strip()), clean_text(row[9].strip())
            label = self.test_label if is_test else row[-1].strip()
            if not text_a or not text_b:
                raise refuse(datapath, number, "a sentence is empty")
            if label not in LABELS:
                raise refuse(datapath, number, f"{label!r} is none of {', '.join(LABELS)}")
            if not row[0].strip().isdecimal():
                raise refuse(datapath, number, f"{row[0]!r} is not the index of a sample")
            samples.append(
                {"text_a": text_a, "text_b": text_b, "label": LABELS[label], "uid": int(row[0].strip())}
            )
            report_count(len(samples), every=50000)
        report_count(len(samples))
        return samples
