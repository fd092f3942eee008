"""How many samples of each validation file a model gets right (spec: tasks, section 7)."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron.core import device, parallel_state
from megatron.core.dist_checkpointing import durable
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training.batch import get_fields_on_this_tp_rank
from megatron.training.utils import is_last_rank, print_rank_last

#: Index in the data set, probabilities, label and id of a sample.
Prediction = tuple[int, list[float], int, int]
Accuracy = Callable[..., None]


def shares_of(dataset: Dataset, batch_size: int) -> tuple[list[list[int]], list[int]]:
    """The batches of this data-parallel rank as lists of sample numbers, and how many samples of each count.

    Each sample counts on one rank. All ranks have as many batches, of the same sizes, since models with experts communicate
    in each of them: a rank that has less repeats the first sample, and does not count it.
    """
    replicas = parallel_state.get_data_parallel_world_size()
    mine = range(parallel_state.get_data_parallel_rank(), len(dataset), replicas)  # type: ignore[arg-type]
    most = -(-len(dataset) // replicas)  # type: ignore[arg-type]
    batches, counted = [], []
    for first in range(0, most, batch_size):
        own = list(mine[first : first + batch_size])
        batches.append(own + [0] * (min(batch_size, most - first) - len(own)))
        counted.append(len(own))
    return batches, counted


def reader(dataset: Dataset, batches: list[list[int]], num_workers: int) -> Iterator[Any] | None:
    """An iterator over these batches on the ranks that read: the first of each tensor-parallel group."""
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return None
    return iter(
        DataLoader(
            dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=device.available(),
            generator=torch.Generator(),  # workers' seeds must not be drawn from the generator of dropout
        )
    )  # fmt: skip


def run_forward(
    step: Callable[..., Any], iterator: Any, model: list[torch.nn.Module], rows: int, args: Namespace
) -> Any:
    """One forward pass of `rows` sequences through all stages; what the step's function says, on the last stage."""
    collected = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterator,
        model=model,
        num_microbatches=1,
        seq_length=args.seq_length,
        micro_batch_size=rows,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return collected[0] if parallel_state.is_pipeline_last_stage() else None


def accuracy_func_provider(
    single_dataset_provider: Callable[[str], Any], args: Namespace, micro_batch_size: int
) -> Accuracy:
    """A function (model, epoch, output_predictions=False) that reports the accuracy on each path of `--valid-data`."""
    datasets = [single_dataset_provider(path) for path in args.valid_data]

    def metrics_func(model: list[torch.nn.Module], epoch: int, output_predictions: bool = False) -> None:
        print_rank_last("calculating metrics ...")
        correct = total = 0
        predictions: list[tuple[str, tuple[list[Any], ...]]] = []
        for dataset in datasets:
            own_correct, own_total, found = calculate_correct_answers(
                args, dataset.dataset_name, model, dataset, micro_batch_size, epoch, output_predictions
            )
            correct += own_correct
            total += own_total
            predictions.append(
                (dataset.dataset_name, tuple(list(part) for part in zip(*(p[1:] for p in found))))
            )
        if not is_last_rank():
            return
        percent = 100.0 * correct / max(total, 1)
        print_rank_last(
            f" >> |epoch: {epoch}| overall: correct / total = {correct} / {total} = {percent:.4f} %"
        )
        if output_predictions:
            names = "".join(f"_{name.replace('/', '-')}" for name, _ in predictions)
            path = Path(args.load) / f"predictions{names}.pt"
            durable.save_torch_file(predictions, path)
            print_rank_last(f"   > saved predictions to {path}")

    return metrics_func


def calculate_correct_answers(
    args: Namespace,
    name: str,
    model: list[torch.nn.Module],
    dataset: Any,
    micro_batch_size: int,
    epoch: int,
    output_predictions: bool = False,
) -> tuple[int, int, list[Prediction]]:
    """Correct and all samples of a data set, and (if wanted, on the last stage) the predictions in its order.

    All ranks must call; counts are summed over data-parallel ranks and known on the last stage.
    """
    start = time.time()
    for chunk in model:
        chunk.eval()
    rows_per_sample = getattr(dataset, "sample_multiplier", 1)
    batches, counted = shares_of(dataset, micro_batch_size)
    iterator = reader(dataset, batches, args.num_workers)
    sums = torch.zeros(2, dtype=torch.int64, device=device.current())
    found: list[Prediction] = []
    for indices, samples in zip(batches, counted):
        step = partial(correct_answers_forward_step, samples)
        result = run_forward(step, iterator, model, len(indices) * rows_per_sample, args)
        if result is None:
            continue
        right, probabilities, labels, uids = result
        sums += torch.stack([right, torch.tensor(samples, device=right.device)])
        if output_predictions:
            rows = zip(indices[:samples], probabilities.tolist(), labels.tolist(), uids.tolist())
            found += list(rows)
    for chunk in model:
        chunk.train()
    if parallel_state.is_pipeline_last_stage():
        group = parallel_state.get_data_parallel_group()
        dist.all_reduce(sums, group=group)
        if output_predictions:
            everyone: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(everyone, found, group=group)
            found = sorted((row for rows in everyone for row in rows), key=lambda row: row[0])
    correct, total = sums.tolist()
    percent = 100.0 * correct / max(total, 1)
    print_rank_last(
        f" > |epoch: {epoch}| metrics for {name}: correct / total = {correct} / {total} = {percent:.4f} %,"
        f" elapsed time (sec): {time.time() - start:.3f}"
    )
    return correct, total, found


def correct_answers_forward_step(
    counted: int, data_iterator: Any, model: torch.nn.Module
) -> tuple[Tensor, Callable[..., Any]]:
    """Logits of a batch; and of its first `counted` samples the number of right ones, probabilities, labels, ids."""
    batch = get_fields_on_this_tp_rank(data_iterator, ("text", "types", "label", "padding_mask", "uid"))
    length = batch["text"].size(-1)
    rows = (batch[name].view(-1, length) for name in ("text", "padding_mask", "types"))

    def compare(logits: Tensor, non_loss_data: bool = True) -> tuple[Tensor, ...]:
        logits, labels = logits[:counted].float(), batch["label"][:counted]
        right = (logits.argmax(-1) == labels).sum()
        return right, logits.softmax(-1), labels, batch["uid"][:counted]

    return model(*rows), compare
