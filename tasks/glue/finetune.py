"""Finetune on MNLI or QQP."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.training import get_tokenizer
from megatron.training.utils import print_rank_0
from tasks.eval_utils import Accuracy, accuracy_func_provider
from tasks.finetune_utils import finetune
from tasks.glue.mnli import MNLIDataset
from tasks.glue.qqp import QQPDataset
from tasks.models import Classification, encoder_arguments

#: Number of classes and the data set of each task.
TASKS: dict[str, tuple[int, type[Any]]] = {"MNLI": (3, MNLIDataset), "QQP": (2, QQPDataset)}


def dataset_name(task: str, path: str) -> str:
    """What a file is called in reports: what follows the task's name in its path, as `dev-matched`."""
    return path.split(task)[-1].removesuffix(".tsv").strip("/").replace("_", "-")


def main(args: Namespace) -> None:
    """Finetune or evaluate as the command line says."""
    num_classes, dataset = TASKS[args.task]

    def build(name: str, paths: list[str]) -> Any:
        return dataset(name, paths, get_tokenizer(), args.seq_length)

    def datasets() -> tuple[Any, Any]:
        return build("training", args.train_data), build("validation", args.valid_data)

    def accuracy(micro_batch_size: int) -> Accuracy:
        return accuracy_func_provider(
            lambda path: build(dataset_name(args.task, path), [path]), args, micro_batch_size
        )

    def model_provider(pre_process: bool = True, post_process: bool = True) -> Classification:
        print_rank_0(f"building classification model for {args.task} ...")
        return Classification(num_outputs=num_classes, **encoder_arguments(args, pre_process, post_process))

    finetune(args, datasets, model_provider, Classification.head, accuracy)
