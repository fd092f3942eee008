"""What MNLI and QQP share: lists of text pairs from tab-separated files, packed when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset

from megatron.core.errors import DataError
from megatron.training.utils import print_rank_0
from tasks.data_utils import build_sample, build_tokens_types_paddings_from_text


class GLUEAbstractDataset(ABC, Dataset):
    """Pairs of texts with a label; `samples` holds dicts of text_a, text_b, label, uid.

    Building prints v0.9's lines on rank 0. DataError names file and line of what cannot be a sample.
    """

    def __init__(
        self, task_name: str, dataset_name: str, datapaths: Sequence[str], tokenizer: Any, max_seq_length: int
    ) -> None:
        self.task_name = task_name
        self.dataset_name = dataset_name
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        print_rank_0(f" > building {task_name} dataset for {dataset_name}:")
        print_rank_0(f"  > paths: {' '.join(datapaths)}")
        self.samples: list[dict[str, Any]] = []
        for path in datapaths:
            self.samples += self.process_samples_from_single_path(path)
        print_rank_0(f"  >> total number of samples: {len(self.samples)}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        raw = self.samples[index]
        packed = build_tokens_types_paddings_from_text(
            raw["text_a"], raw["text_b"], self.tokenizer, self.max_seq_length
        )
        return build_sample(*packed, raw["label"], raw["uid"])

    @abstractmethod
    def process_samples_from_single_path(self, datapath: str) -> list[dict[str, Any]]:
        """The samples of one file."""


def rows_of(path: str) -> Iterator[tuple[int, list[str]]]:
    """Number and columns of each line, the header first; as v0.9, without white space at the ends of a line."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.strip().split("\t")


def refuse(path: str, number: int, why: str) -> DataError:
    """The error for a line that cannot be a sample."""
    return DataError(f"{path}, line {number}", why, "mend the line or leave it out")


def report_count(count: int, *, every: int | None = None) -> None:
    """Say how many samples a file has given, or (with `every`) say so each so many."""
    if every is None:
        print_rank_0(f" >> processed {count} samples.")
    elif count % every == 0:
        print_rank_0(f"  > processed {count} so far ...")
