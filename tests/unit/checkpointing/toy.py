"""One-process runs of a toy model that save and load as the training loop does."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.tensor_parallel.random import destroy_rng_tracker
from megatron.training.checkpointing import load_checkpoint, save_checkpoint


@contextmanager
def one_process() -> Iterator[None]:
    """Process groups, random states and microbatches of a world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(123)
        init_num_microbatches_calculator(0, None, 4, 2, 1)
        yield
    finally:
        destroy_num_microbatches_calculator()
        destroy_rng_tracker()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def arguments(directory: Path, **changes: Any) -> Namespace:
    """What saving and loading read of a run's arguments."""
    args = Namespace(
        save=str(directory), load=str(directory), pretrained_checkpoint=None, ckpt_format="torch", async_save=None,
        ckpt_fully_parallel_save=True, ckpt_fully_parallel_load=False, ckpt_assume_constant_structure=False,
        dist_ckpt_strictness="assume_ok_unexpected", data_parallel_random_init=False, no_save_optim=None,
        no_save_rng=None, no_load_optim=None, no_load_rng=None, finetune=False, fp16=False, bf16=False,
        use_distributed_optimizer=False, exit_on_missing_checkpoint=False, num_attention_heads=2, num_layers=2,
        hidden_size=8, add_position_embedding=True, tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
        consumed_train_samples=0, skipped_train_samples=0, consumed_valid_samples=0, ckpt_step=None,
        non_persistent_save_interval=None, non_persistent_global_ckpt_dir=None, keep_last_checkpoints=None,
        allow_unsafe_pickle=False, vocab_file=None,
    )  # fmt: skip
    vars(args).update(changes)
    return args


class Toy(torch.nn.Module):
    """Two linear layers with dropout between them, described for both formats."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width)
        self.second = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.dropout(self.first(x), 0.5))

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        return self.state_dict(prefix=prefix, keep_vars=keep_vars)

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        return {
            name: ShardedTensor.from_rank_offsets(prefix + name, value)
            for name, value in self.state_dict(prefix=prefix, keep_vars=True).items()
        }


class ToyOptimizer(torch.optim.AdamW):
    """AdamW that keeps its state as a common value in the distributed format."""

    def sharded_state_dict(
        self, model_state: dict[str, Any], is_loading: bool = False, **_: Any
    ) -> dict[str, Any]:
        return self.state_dict()


class Run:
    """A model in training; `step` draws its data and its dropout from the random states."""

    def __init__(self, args: Namespace, width: int = 8) -> None:
        torch.manual_seed(5)
        self.args = args
        self.model = Toy(width)
        self.optimizer = ToyOptimizer(self.model.parameters(), lr=0.1)
        self.iteration = 0

    def step(self) -> None:
        """One update."""
        self.optimizer.zero_grad()
        self.model(torch.randn(4, self.model.first.in_features)).square().mean().backward()
        self.optimizer.step()
        self.iteration += 1
        self.args.consumed_train_samples += 4

    def save(self, **options: Any) -> None:
        """Save at the present iteration."""
        save_checkpoint(
            self.iteration,
            [self.model],
            self.optimizer,
            None,
            10.0 * self.iteration,
            args=self.args,
            **options,
        )

    def load(self, **options: Any) -> int:
        """Load; returns the iteration."""
        self.iteration, _ = load_checkpoint([self.model], self.optimizer, None, args=self.args, **options)
        return self.iteration

    def weights(self) -> list[torch.Tensor]:
        """Copies of all parameters."""
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other))
