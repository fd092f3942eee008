"""Flags of the tasks, which of them a task reads, and what must hold between them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any

from megatron.core.errors import FlagError
from megatron.core.flags import Rule, flag, flags_of, rule
from megatron.training.config import rules
from megatron.training.config.parser import add_flag, all_flags
from megatron.training.config.rules import loop

FINETUNED = ("MNLI", "QQP", "RACE")
ZERO_SHOT = ("LAMBADA", "WIKITEXT103")
#: Tasks of v0.9 that retrieve passages.
RETRIEVAL = ("ICT-ZEROSHOT-NQ", "RETRIEVER-EVAL", "RET-FINETUNE-NQ")

_RETRIEVAL: dict[str, Any] = {
    "group": "tasks", "status": "unsupported", "reason": "retrieval models (ICT, ORQA) are not part of this project",
}  # fmt: skip


@dataclass
class TasksConfig:
    """What to do, on which files."""

    # fmt: off
    task: str | None = flag(None, group="tasks", help="MNLI, QQP or RACE to finetune, LAMBADA or WIKITEXT103 to evaluate.")
    epochs: int | None = flag(None, group="tasks", help="Passes over the training data; 0 evaluates only.")
    keep_last: bool = flag(
        False, group="tasks", help="Train on the last batch of an epoch too if it is smaller than the others.")
    train_data: list[str] | None = flag(
        None, nargs="+", parse=None, group="tasks", help="Training files (RACE: directories), one after the other.")
    valid_data: list[str] | None = flag(
        None, nargs="*", parse=None, group="tasks", help="Validation files (RACE: directories), reported one by one.")
    overlapping_eval: int = flag(32, group="tasks", help="WIKITEXT103: tokens by which the window moves.")
    strict_lambada: bool = flag(False, group="tasks", help="LAMBADA: the last word instead of the last token.")
    qa_data_dev: str | None = flag(None, **_RETRIEVAL, help="Questions to develop on.")
    qa_data_test: str | None = flag(None, **_RETRIEVAL, help="Questions to test on.")
    faiss_use_gpu: bool = flag(False, **_RETRIEVAL, help="Search on the GPU.")
    faiss_match: str = flag("string", choices=("regex", "string"), **_RETRIEVAL, help="How answers are compared.")
    faiss_topk_retrievals: int = flag(100, **_RETRIEVAL, help="Passages to retrieve.")
    eval_micro_batch_size: int | None = flag(None, **_RETRIEVAL, help="Questions in a validation batch.")
    train_with_neg: bool = flag(False, **_RETRIEVAL, help="Train against negative passages.")
    train_hard_neg: int = flag(0, **_RETRIEVAL, help="Hard negatives in training.")
    val_av_rank_hard_neg: int = flag(30, **_RETRIEVAL, help="Hard negatives in validation.")
    val_av_rank_other_neg: int = flag(30, **_RETRIEVAL, help="Other negatives in validation.")
    # fmt: on


#: Which flags of the tasks, and of training, a kind of task reads; the start-up report names typed ones that it does not.
_OF_FINETUNING = {"epochs", "keep_last", "train_data", "pretrained_checkpoint"}
_OF_ZERO_SHOT = {"overlapping_eval", "strict_lambada"}
_OF_PRETRAINING = {"mask_prob", "short_seq_prob", "bert_binary_head", "train_iters", "train_samples"}
_UNREAD = {
    "WIKITEXT103": rules.UNREAD["GPT"] | _OF_FINETUNING | {"strict_lambada"},
    "LAMBADA": rules.UNREAD["GPT"] | _OF_FINETUNING | {"overlapping_eval"},
    **dict.fromkeys(FINETUNED, rules.UNREAD["BERT"] | _OF_PRETRAINING | _OF_ZERO_SHOT),
}

#: Checked for every task.
TASKS: list[Rule] = []
#: Checked for tasks that train when they do.
FINETUNING: list[Rule] = []


def add_tasks_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the tasks' flags. Their --keep-last is about batches; that of training stays as --keep-last-checkpoints."""
    parser.conflict_handler = "resolve"
    group = parser.add_argument_group("tasks", "What to do, on which files.")
    for declared in flags_of(TasksConfig):
        add_flag(group, declared)
    return parser


def check_task(args: Namespace) -> None:
    """Refuse what the task cannot do, with FlagError, and note which given flags it does not read."""
    rules.check(args, TASKS)
    for declared in flags_of(TasksConfig):
        if declared.status == "unsupported" and getattr(args, declared.dest) != declared.cli_default:
            raise FlagError(declared.spellings[0], f"not supported: {declared.reason}", "remove the flag")
    if args.task in FINETUNED:
        rules.check(args, rules.BERT)
        if args.epochs:
            # The epochs give the length of training.
            length = loop.training_has_a_length
            rules.check(args, [*(r for r in rules.TRAINING if r.holds is not length), *FINETUNING])
    declared = [*all_flags(), *flags_of(TasksConfig)]
    args.notices += rules.unread_flags(args, args.task, _UNREAD[args.task], declared)


# fmt: off
@rule(TASKS, "--task", bad="-task", why="it is not said what to do",
      fix=f"give one of {', '.join((*FINETUNED, *ZERO_SHOT))}")
def task_given(args: Any) -> bool:
    return args.task is not None


@rule(TASKS, "--task", bad="--task ICT-ZEROSHOT-NQ",
      why="{a.task} needs retrieval models, which are not part of this project",
      fix=f"the tasks are {', '.join((*FINETUNED, *ZERO_SHOT))}")
def task_retrieves_nothing(args: Any) -> bool:
    return args.task not in RETRIEVAL


@rule(TASKS, "--task", bad="--task SQUAD", why="there is no task {a.task}",
      fix=f"the tasks are {', '.join((*FINETUNED, *ZERO_SHOT))}")
def task_known(args: Any) -> bool:
    return args.task in (*FINETUNED, *ZERO_SHOT)


@rule(TASKS, "--num-layers-per-virtual-pipeline-stage",
      bad="--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
      why="the tasks have no interleaved schedule", fix="drop it: a checkpoint in torch_dist format loads in any layout")
def stages_are_plain(args: Any) -> bool:
    return args.virtual_pipeline_model_parallel_size is None


@rule(TASKS, "--context-parallel-size", bad="--context-parallel-size 2", why="the tasks do not divide samples",
      fix="use --tensor-model-parallel-size with --sequence-parallel")
def samples_are_whole(args: Any) -> bool:
    return args.context_parallel_size == 1


@rule(TASKS, "--data-path", "--mock-data", bad="--mock-data", why="the tasks read files of their own",
      fix="give --valid-data, and --train-data to finetune")
def data_are_the_tasks(args: Any) -> bool:
    return not (args.mock_data or args.data_path)


@rule(TASKS, "--valid-data", bad="--valid-data a.txt b.txt", why="{a.task} is evaluated on one file", fix="give exactly one")
def one_file_to_evaluate(args: Any) -> bool:
    return args.task not in ZERO_SHOT or len(args.valid_data or ()) == 1


@rule(TASKS, "--epochs", bad="--task MNLI", why="it is not said how long to train", fix="give --epochs; 0 evaluates only")
def epochs_given(args: Any) -> bool:
    return args.task not in FINETUNED or (args.epochs is not None and args.epochs >= 0)


@rule(TASKS, "--valid-data", bad="--task MNLI --epochs 0 -valid-data", why="there is nothing to evaluate on",
      fix="name the files of the validation set")
def validation_given(args: Any) -> bool:
    return args.task not in FINETUNED or bool(args.valid_data)


@rule(TASKS, "--load", "--pretrained-checkpoint", bad="--task MNLI --epochs 0",
      why="evaluation alone needs a finetuned model", fix="give its directory as --load")
def something_to_evaluate(args: Any) -> bool:
    return args.task not in FINETUNED or args.epochs != 0 or args.load is not None


@rule(FINETUNING, "--train-data", bad="-train-data", why="there is nothing to train on", fix="name the training files")
def training_given(args: Any) -> bool:
    return bool(args.train_data)


@rule(FINETUNING, "--rampup-batch-size", bad="--rampup-batch-size 2 2 100", why="finetuning has batches of one size",
      fix="drop it")
def batch_is_constant(args: Any) -> bool:
    return args.rampup_batch_size is None


@rule(FINETUNING, "--global-batch-size", "--micro-batch-size", bad="--global-batch-size 8",
      why="a finetuning step is one micro batch on each replica, {a.micro_batch_size} x {a.data_parallel_size} samples, "
          "not {a.global_batch_size}",
      fix="drop --global-batch-size, or raise --micro-batch-size")
def no_accumulation(args: Any) -> bool:
    return args.global_batch_size == args.micro_batch_size * args.data_parallel_size


@rule(FINETUNING, "--keep-last", "--pipeline-model-parallel-size", bad="--keep-last --pipeline-model-parallel-size 2",
      why="the stages of a pipeline exchange batches of one size", fix="drop --keep-last")
def batches_fit_the_pipeline(args: Any) -> bool:
    return not args.keep_last or args.pipeline_model_parallel_size == 1
