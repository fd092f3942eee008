"""Finetune on RACE."""

from __future__ import annotations

from argparse import Namespace

from megatron.training import get_tokenizer
from megatron.training.utils import print_rank_0
from tasks.eval_utils import Accuracy, accuracy_func_provider
from tasks.finetune_utils import finetune
from tasks.models import MultipleChoice, encoder_arguments
from tasks.race.data import RaceDataset


def dataset_name(path: str) -> str:
    """What a directory is called in reports: what follows RACE in its path, as `dev-middle`."""
    return path.split("RACE")[-1].strip("/").replace("/", "-")


def main(args: Namespace) -> None:
    """Finetune or evaluate as the command line says."""

    def build(name: str, paths: list[str]) -> RaceDataset:
        return RaceDataset(name, paths, get_tokenizer(), args.seq_length)

    def datasets() -> tuple[RaceDataset, RaceDataset]:
        return build("training", args.train_data), build("validation", args.valid_data)

    def accuracy(micro_batch_size: int) -> Accuracy:
        return accuracy_func_provider(lambda path: build(dataset_name(path), [path]), args, micro_batch_size)

    def model_provider(pre_process: bool = True, post_process: bool = True) -> MultipleChoice:
        print_rank_0("building multichoice model for RACE ...")
        return MultipleChoice(**encoder_arguments(args, pre_process, post_process))

    finetune(args, datasets, model_provider, MultipleChoice.head, accuracy)
