"""Which samples each data-parallel rank reads, in which order, from where a run was stopped."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from megatron.core import device, parallel_state
from megatron.core.errors import DataError, MegatronError
from megatron.training.global_vars import get_args


def build_pretraining_data_loader(
    dataset: Any, consumed_samples: int, *, args: Namespace | None = None
) -> Any:
    """The loader of this data-parallel rank for `dataset`, starting after `consumed_samples` of the whole run.

    None for a dataset that is None or has no samples. An external dataset is its own loader.
    """
    args = args if args is not None else get_args()
    if dataset is None or args.dataloader_type == "external":
        return dataset
    return build_data_loader(
        dataset,
        consumed_samples,
        dataloader_type=args.dataloader_type or "single",
        micro_batch_size=args.micro_batch_size,
        num_workers=args.num_workers,
        data_sharding=args.data_sharding,
        # Context-parallel ranks read the same samples and keep their part of the sequence.
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )


def build_data_loader(
    dataset: Any,
    consumed_samples: int,
    *,
    dataloader_type: str,
    micro_batch_size: int,
    num_workers: int,
    data_sharding: bool,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Any:
    """The same from explicit values; `dataloader_type` is `single` or `cyclic`."""
    if len(dataset) == 0:
        return None
    sampler: MegatronPretrainingSampler | MegatronPretrainingRandomSampler
    if dataloader_type == "single":
        sampler = MegatronPretrainingSampler(
            total_samples=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
    elif dataloader_type == "cyclic":
        sampler = MegatronPretrainingRandomSampler(
            dataset,
            total_samples=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
            data_sharding=data_sharding,
        )
    else:
        raise DataError(
            "--dataloader-type", f"{dataloader_type!r} is not known", "use single, cyclic or external"
        )
    options: dict[str, Any] = {
        "batch_sampler": sampler,
        "pin_memory": device.available(),
        # Iterators draw their workers' seed. From the default generator that would give the one tensor-parallel rank which
        # reads other dropout masks than its peers (on the CPU, where it is the device's generator too).
        "generator": torch.Generator(),
    }
    if num_workers == 0:
        return DataLoader(dataset, **options)
    return _WorkerLoader(
        _SamplesOrError(dataset),
        num_workers=num_workers,
        persistent_workers=True,
        collate_fn=_collate,
        **options,
    )


class _WorkerLoader(DataLoader):
    """A DataLoader that raises the errors its worker processes send as batches."""

    def __iter__(self) -> Any:
        return _raise_errors(super().__iter__())


def _raise_errors(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, MegatronError):
            try:
                raise batch
            finally:
                del batch  # else the error would keep itself, by its traceback, and with it the workers
        yield batch


class _SamplesOrError(Dataset):
    """A dataset that gives an error of ours in place of a batch: raised, it would arrive as the text of a traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, samples: list[int]) -> list[Any] | MegatronError:
        try:
            return [self.dataset[sample] for sample in samples]
        except MegatronError as error:
            return error


class _Batch(dict[str, Tensor]):
    """A batch that goes from a worker process to the reader as one piece of shared memory and arrives as a plain dict.

    A tensor that goes by itself costs a file descriptor and a handshake; four of those take longer than reading samples.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        content: list[Tensor] = []
        places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        position = 0
        # The widest numbers first: then all are aligned.
        for name, values in sorted(self.items(), key=lambda item: -item[1].element_size()):
            content.append(values.reshape(-1).view(torch.uint8))
            places[name] = position, values.dtype, values.shape
            position += content[-1].numel()
        return _unpack, (torch.cat(content), [(name, *places[name]) for name in self])


def _unpack(content: Tensor, fields: list[tuple[str, int, torch.dtype, torch.Size]]) -> dict[str, Tensor]:
    """Views of the fields in content uint8 [bytes]; for each its name, first byte, dtype and shape."""
    return {
        name: content[first : first + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for name, first, dtype, shape in fields
    }


def _collate(samples: list[Any] | MegatronError) -> Any:
    """The samples as one batch, as by default; one of tensors by name travels in one piece."""
    if isinstance(samples, MegatronError):
        return samples
    batch = default_collate(samples)
    by_name = isinstance(batch, dict) and all(isinstance(values, Tensor) for values in batch.values())
    return _Batch(batch) if by_name else batch


class MegatronPretrainingSampler:
    """One pass in order: each window of micro batch x data-parallel size samples is divided among the ranks.

    Yields lists of `micro_batch_size` sample numbers. The sample after the consumed ones comes next whatever the
    data-parallel size was before.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        drop_last: bool = True,
    ) -> None:
        _check_batches(total_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
        if consumed_samples >= total_samples:
            raise DataError(
                "data loader",
                f"no samples left to consume: {consumed_samples}, {total_samples}",
                "train for fewer samples, add data, or use --dataloader-type cyclic",
            )
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.micro_batch_times_data_parallel_size = micro_batch_size * data_parallel_size
        self.drop_last = drop_last

    def __len__(self) -> int:
        return self.total_samples

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.data_parallel_rank * self.micro_batch_size
        window = self.micro_batch_times_data_parallel_size
        for first in range(self.consumed_samples, self.total_samples, window):
            samples = range(first, min(first + window, self.total_samples))
            if len(samples) == window or not self.drop_last:
                yield list(samples[begin : begin + self.micro_batch_size])


class MegatronPretrainingRandomSampler:
    """Endless epochs in random order, seeded by the epoch number.

    With `data_sharding` each rank shuffles a contiguous part of its own, else all share one order and take turns.
    Each pass over the sampler is the rest of one epoch; it counts what all ranks consume.
    """

    def __init__(
        self,
        dataset: Any,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        data_sharding: bool,
    ) -> None:
        _check_batches(total_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
        self.dataset = dataset
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.data_sharding = data_sharding
        self.micro_batch_times_data_parallel_size = micro_batch_size * data_parallel_size
        self.last_batch_size = total_samples % self.micro_batch_times_data_parallel_size
        if self.last_batch_size == total_samples:
            raise DataError(
                "data loader",
                f"{total_samples} samples fill no batch of {self.micro_batch_times_data_parallel_size} over all ranks",
                "add data, or lower --micro-batch-size",
            )

    def __len__(self) -> int:
        return self.total_samples

    def __iter__(self) -> Iterator[list[int]]:
        window = self.micro_batch_times_data_parallel_size
        epoch_samples = self.total_samples - self.last_batch_size
        epoch, done = divmod(self.consumed_samples, epoch_samples)
        if done % window:
            raise DataError(
                "data loader",
                f"{self.consumed_samples} consumed samples end inside a batch of {window} over all ranks",
                "resume with a micro batch times data-parallel size that divides the one before",
            )
        if isinstance(self.dataset, RandomSeedDataset):
            self.dataset.set_epoch(epoch)
        generator = torch.Generator()
        generator.manual_seed(epoch)
        if self.data_sharding:
            shard = self.total_samples // window * self.micro_batch_size
            order = torch.randperm(shard, generator=generator)[done // self.data_parallel_size :]
            samples = (order + self.data_parallel_rank * shard).tolist()
        else:
            full = self.total_samples // self.micro_batch_size * self.micro_batch_size
            order = torch.randperm(full, generator=generator)[done:]
            samples = order[self.data_parallel_rank :: self.data_parallel_size].tolist()
        for first in range(0, len(samples) - self.micro_batch_size + 1, self.micro_batch_size):
            self.consumed_samples += window
            yield samples[first : first + self.micro_batch_size]


class RandomSeedDataset(Dataset):
    """A dataset whose random transformations depend on the sample and the epoch only."""

    def __init__(self, dataset: Any, seed: int | None = None) -> None:
        self.base_seed = get_args().seed if seed is None else seed
        self.curr_seed = self.base_seed
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Seed the following samples for this epoch."""
        self.curr_seed = self.base_seed + epoch

    def __getitem__(self, idx: int) -> Any:
        seed = idx + self.curr_seed
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        return self.dataset[idx]


def _check_batches(
    total_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> None:
    if total_samples <= 0:
        raise DataError("data loader", f"no sample to consume: {total_samples}", "give the split data")
    if micro_batch_size <= 0 or not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(
            f"micro batch size {micro_batch_size}, data-parallel rank {data_parallel_rank} of {data_parallel_size}"
        )
