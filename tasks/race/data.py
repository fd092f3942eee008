"""RACE: English examinations, a text with questions of four choices each (Lai et al. 2017)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from megatron.core.errors import DataError
from megatron.training.utils import print_rank_0
from tasks.data_utils import build_sample, build_tokens_types_paddings_from_ids, clean_text

NUM_CHOICES = 4
MAX_QA_LENGTH = 128


class RaceDataset(Dataset):
    """All questions in the `*.txt` files of directories; a sample is four sequences of question, choice and text.

    `sample_multiplier` is how many sequences one sample gives. Building prints v0.9's lines on rank 0. Files are read in
    the order of their names, so that samples keep their ids from machine to machine.
    """

    sample_multiplier = NUM_CHOICES

    def __init__(
        self,
        dataset_name: str,
        datapaths: Sequence[str],
        tokenizer: Any,
        max_seq_length: int,
        max_qa_length: int = MAX_QA_LENGTH,
    ) -> None:
        self.dataset_name = dataset_name
        print_rank_0(f" > building RACE dataset for {dataset_name}:")
        print_rank_0(f"  > paths: {' '.join(datapaths)}")
        self.samples: list[dict[str, Any]] = []
        for path in datapaths:
            self.samples += process_single_datapath(path, tokenizer, max_qa_length, max_seq_length)
        print_rank_0(f"  >> total number of samples: {len(self.samples)}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]


def process_single_datapath(
    datapath: str, tokenizer: Any, max_qa_length: int, max_seq_length: int
) -> list[dict[str, Any]]:
    """The samples of one directory; DataError names the file and line of what cannot be one."""
    print_rank_0(f"   > working on {datapath}")
    start = time.time()
    samples: list[dict[str, Any]] = []
    documents = questions = 0
    for place, document in _documents(datapath):
        documents += 1
        questions += len(document["questions"])
        context = tokenizer.tokenize(clean_text(document["article"]))
        for question, choices, answer in zip(document["questions"], document["options"], document["answers"]):
            label = ord(answer) - ord("A") if len(answer) == 1 else -1
            if not 0 <= label < NUM_CHOICES or len(choices) != NUM_CHOICES:
                why = f"a question has {len(choices)} choices and the answer {answer!r}"
                raise DataError(place, why, f"give {NUM_CHOICES} choices and a letter from A to D")
            packed = [
                build_tokens_types_paddings_from_ids(
                    tokenizer.tokenize(question_and_answer(question, choice))[:max_qa_length],
                    context, max_seq_length, tokenizer.cls, tokenizer.sep, tokenizer.pad,
                )
                for choice in choices
            ]  # fmt: skip
            ids, types, paddings = zip(*packed)
            samples.append(build_sample(ids, types, paddings, label, len(samples)))
    seconds = time.time() - start
    print_rank_0(
        f"    > processed {documents} document, {questions} questions, and {len(samples)} samples in {seconds:.2f} seconds"
    )
    return samples


def question_and_answer(question: str, choice: str) -> str:
    """The question with its gaps filled by the choice, or followed by it."""
    text = question.replace("_", choice) if "_" in question else f"{question} {choice}"
    return clean_text(text)


def _documents(datapath: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each document of a directory: an article and lists of questions, options, answers."""
    files = sorted(Path(datapath).glob("*.txt"))
    if not files:
        raise DataError(datapath, "it holds no .txt file", "give a directory such as RACE/train/middle")
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                place = f"{path}, line {number}"
                try:
                    document = json.loads(line)
                    lengths = {len(document[name]) for name in ("questions", "options", "answers")}
                    article = document["article"]
                except (ValueError, KeyError, TypeError) as error:
                    why = f"it is no document of RACE ({error})"
                    raise DataError(place, why, "give the files of the release") from error
                if len(lengths) > 1 or not isinstance(article, str):
                    raise DataError(
                        place, "its questions, options and answers differ in number", "mend the document"
                    )
                yield place, document
