"""Texts of the evaluation tasks whose n-grams shall not be trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from loose_json import need, parse, read_lines, text_of


class HubTask(NamedTuple):
    """A data set of the HuggingFace hub: arguments of `load_dataset`, and the texts of one of its rows."""

    arguments: tuple[str, ...]
    split: str
    texts: Callable[[Any], list[str]]


#: Tasks by name.
HUB_TASKS = {
    "squad": HubTask(("squad_v2",), "validation", lambda row: [row["question"]]),
    "natural_questions": HubTask(("natural_questions",), "validation", lambda row: [row["question"]["text"]]),
    "triviaqa": HubTask(("trivia_qa", "unfiltered"), "test", lambda row: [row["question"]]),
    "webqa": HubTask(("web_questions",), "test", lambda row: [row["question"]]),
    "race": HubTask(("race", "all"), "test", lambda row: [row["question"]]),
    "drop": HubTask(("drop",), "validation", lambda row: [row["question"]]),
    "coqa": HubTask(("coqa",), "validation", lambda row: list(row["questions"])),
    "piqa": HubTask(("piqa",), "test", lambda row: [row["goal"]]),
}
TASKS = ("lambada", *HUB_TASKS)


def texts_of(task: str, lambada_path: str | None) -> Iterator[str]:
    """The texts of a task: LAMBADA's from a file, the others' from the hub or its cache on this machine."""
    if task == "lambada":
        assert lambada_path is not None, "the command line was checked"
        for line in read_lines(lambada_path):
            yield text_of(parse(line), "text", line)
        return
    arguments, split, texts = HUB_TASKS[task]
    for row in need("datasets", f"--tasks {task}").load_dataset(*arguments, split=split):
        yield from texts(row)
