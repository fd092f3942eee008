"""Several optimizers that act as one: dense and expert parameters, or the model chunks of an overlapped update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.errors import CheckpointError
from megatron.core.optimizer.distrib_checkpoint import read_parameter_state, write_parameter_state
from megatron.core.optimizer.optimizer import MegatronOptimizer, StepResult
from megatron.core.timers import timed

if TYPE_CHECKING:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


class ProxyDict:
    """Several dicts seen as one whose keys are (index of the dict, its key). Writing goes through."""

    def __init__(self, inner_dicts: Sequence[dict[Any, Any]]) -> None:
        self._inner_dicts = inner_dicts

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        index, inner_key = key
        return self._inner_dicts[index].get(inner_key)

    def __setitem__(self, key: tuple[int, Any], value: Any) -> None:
        index, inner_key = key
        self._inner_dicts[index][inner_key] = value

    def __len__(self) -> int:
        return sum(len(inner) for inner in self._inner_dicts)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for index, inner in enumerate(self._inner_dicts):
            for inner_key in inner:
                yield index, inner_key

    def items(self) -> Iterator[tuple[tuple[int, Any], Any]]:
        """Pairs of (index, key) and value."""
        for index, inner in enumerate(self._inner_dicts):
            for inner_key, value in inner.items():
                yield (index, inner_key), value


class ChainedOptimizer(MegatronOptimizer):
    """Optimizers stepped together: one of them overflowing skips all, and all are clipped by the common norm."""

    def __init__(self, chained_optimizers: Sequence[Any]) -> None:
        self.chained_optimizers = list(chained_optimizers)
        self.config = getattr(self.chained_optimizers[0], "config", None)  # type: ignore[assignment]
        self.model_chunks = []
        for optimizer in self.chained_optimizers:
            for chunk in getattr(optimizer, "model_chunks", []):
                if chunk not in self.model_chunks:
                    self.model_chunks.append(chunk)

    @property  # type: ignore[misc]
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, one after the other."""
        return [group for optimizer in self.chained_optimizers for group in optimizer.param_groups]

    @property  # type: ignore[misc]
    def state(self) -> ProxyDict:
        """The states of all optimizers under (index of the optimizer, parameter)."""
        return ProxyDict([optimizer.state for optimizer in self.chained_optimizers])

    def get_parameters(self) -> list[Tensor]:
        """The parameters of all optimizers, one after the other."""
        return [param for optimizer in self.chained_optimizers for param in optimizer.get_parameters()]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all."""
        for optimizer in self.chained_optimizers:
            optimizer.zero_grad(set_to_none)

    def get_loss_scale(self) -> Tensor:
        """The first optimizer's; all see the same overflows and so have the same."""
        return self.chained_optimizers[0].get_loss_scale()

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return self.chained_optimizers[0].scale_loss(loss)

    def reload_model_params(self) -> None:
        """Take the model's parameters over into all copies."""
        for optimizer in self.chained_optimizers:
            optimizer.reload_model_params()

    def prepare_grads(self) -> bool:
        """Prepare all (each adapts its loss scale); True if any overflowed."""
        overflows = [optimizer.prepare_grads() for optimizer in self.chained_optimizers]
        return any(overflows)

    def step_with_ready_grads(self) -> bool:
        """Update all; the first chunk's parameters travel while the others are updated, if that is asked for."""
        success = True
        for index, optimizer in enumerate(self.chained_optimizers):
            success &= optimizer.step_with_ready_grads()
            if index == 0 and self.config.overlap_param_gather_with_optimizer_step and success:
                assert len(optimizer.model_chunks) == 1, "the first optimizer must own one model chunk"
                optimizer.model_chunks[0].start_param_sync(force_dispatch=True)
        return success

    def grad_norm_tensor(self) -> Tensor:
        """The norm over the parameters of all optimizers."""
        norms = [optimizer.grad_norm_tensor() for optimizer in self.chained_optimizers]
        return torch.stack(norms).square_().sum().sqrt_()

    def get_grad_norm(self) -> float:
        """The norm over the parameters of all optimizers."""
        return math.sqrt(sum(optimizer.get_grad_norm() ** 2 for optimizer in self.chained_optimizers))

    def count_zeros(self) -> float:
        """Zeros in the gradients of all."""
        return sum(optimizer.count_zeros() for optimizer in self.chained_optimizers)

    def step(self) -> StepResult:
        """As every optimizer's, except that the norm is always computed and uncounted zeros are 0, as in v0.9."""
        if self.prepare_grads():
            return False, None, None
        norm = self.grad_norm_tensor()
        if self.config.clip_grad > 0.0:
            for optimizer in self.chained_optimizers:
                with timed(optimizer.config, "optimizer-clip-main-grad"):
                    optimizer.clip_by(self.config.clip_grad, norm)
        num_zeros = self.count_zeros() if self.config.log_num_zeros_in_grad else 0
        success = self.step_with_ready_grads()
        return success, norm.item() if norm.device.type == "cpu" else norm, num_zeros

    def disable_pre_hook(self) -> None:
        """Gather parameters now and stop gathering them in forward (overlapped parameter gathering only)."""
        for chunk in self.model_chunks:
            chunk.disable_forward_pre_hook()

    def enable_pre_hook(self) -> None:
        """Gather parameters in forward again."""
        for chunk in self.model_chunks:
            chunk.enable_forward_pre_hook()

    # State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """One dict per optimizer."""
        return [optimizer.state_dict() for optimizer in self.chained_optimizers]

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a list (torch format) or a dict with keys 0, 1, .. (distributed formats)."""
        if len(state_dict) != len(self.chained_optimizers):
            raise CheckpointError(
                "optimizer state",
                f"the checkpoint holds {len(state_dict)} optimizers, this run {len(self.chained_optimizers)}",
                "use the expert-parallel size and overlap flags of the checkpoint, or --no-load-optim",
            )
        parts = [state_dict[i] for i in sorted(state_dict)] if isinstance(state_dict, dict) else state_dict
        for optimizer, part in zip(self.chained_optimizers, parts):
            optimizer.load_state_dict(part)

    def sharded_state_dict(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False, **kwargs: Any
    ) -> ShardedStateDict:
        """Per optimizer its own, with keys prefixed `chained_<i>.`."""
        result: dict[Any, Any] = {}
        for index, optimizer in enumerate(self.chained_optimizers):
            part = optimizer.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
            add_prefix_for_sharding(part, f"chained_{index}.")
            result[index] = part
        return result

    def _distributed(self) -> list[DistributedOptimizer | None]:
        """The optimizers that have sharded state, None for the others."""
        return [
            optimizer if hasattr(optimizer, "get_parameter_state_dp_zero") else None
            for optimizer in self.chained_optimizers
        ]

    def save_parameter_state(self, filename: str | Path) -> None:
        """Write all sharded states into one file: a list with None where another rank writes. All ranks must call."""
        states = [
            None if optimizer is None else optimizer.get_parameter_state_dp_zero()
            for optimizer in self._distributed()
        ]
        if any(state is not None for state in states):
            write_parameter_state(states, filename)

    def load_parameter_state(self, filename: str | Path, *, update_legacy_format: bool = False) -> None:
        """Read what `save_parameter_state` wrote and spread it. All ranks must call."""
        states: Any = None
        for index, optimizer in enumerate(self._distributed()):
            if optimizer is None:
                continue
            if states is None and optimizer.data_parallel_rank == 0:
                states = read_parameter_state(filename)
            optimizer.load_parameter_state_from_dp_zero(
                states[index] if states is not None else None, update_legacy_format=update_legacy_format
            )
