"""The optimizer whose state is divided over the data-parallel ranks (ZeRO stage 1, arXiv:1910.02054)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup, _ParamAndGradBuffer
from megatron.core.errors import InvariantError
from megatron.core.fp8 import weights as fp8_weights
from megatron.core.optimizer.adam import Adam
from megatron.core.optimizer.distrib_checkpoint import ParameterStateFormats
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.optimizer.mixed_precision import HALF, MixedPrecisionOptimizer, main_copy
from megatron.core.optimizer.optimizer import InitState, drop_grads
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.shard_layout import Piece, Range, plan_shards
from megatron.core.timers import timed

__all__ = ["DistributedOptimizer", "OwnedPiece", "Range"]


def _has_main_copy(param: torch.nn.Parameter) -> bool:
    """Whether updates are made to an fp32 copy of the parameter's values."""
    return param.dtype in HALF or fp8_weights.of(param) is not None


@dataclass(eq=False)
class OwnedPiece:
    """A part of a parameter that this rank updates: where it lies, and the 1-D tensor the torch optimizer sees.

    `main` is an fp32 copy of the part of a half-precision or fp8 parameter, and a view into any other.
    """

    param: torch.nn.Parameter
    place: Piece
    main: Tensor

    @property
    def flat_slice(self) -> slice:
        """The part, counted in the flattened parameter."""
        return self.place.in_param.as_slice

    def of_model(self) -> Tensor:
        """The part's values in the model, 1-D: a view, or what its fp8 numbers stand for."""
        return fp8_weights.values_of(self.param).view(-1)[self.flat_slice]

    def of_gradient(self) -> Tensor:
        """A 1-D view of the part's reduced gradient."""
        return self.param.main_grad.view(-1)[self.flat_slice]  # type: ignore[attr-defined]


class DistributedOptimizer(ParameterStateFormats, MixedPrecisionOptimizer):
    """Every data-parallel rank updates an equal part of each bucket and gathers the rest from the others.

    Needs chunks wrapped with use_distributed_optimizer, whose parameters live in flat buffers. Works for fp16, bf16, fp32
    and float64. `per_model_buffers` are the buffers of each chunk whose parameters `optimizer` holds; of these it keeps
    the owned pieces. `data_parallel_group_idx` tells model-parallel shards apart in some checkpoint formats.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        grad_scaler: MegatronGradScaler | None,
        init_state_fn: InitState,
        model_chunks: list[DistributedDataParallel],
        per_model_buffers: dict[int, list[_ParamAndGradBuffer]],
        data_parallel_group: ProcessGroup | None,
        data_parallel_group_gloo: ProcessGroup | None,
        data_parallel_group_idx: int,
    ) -> None:
        if not isinstance(optimizer, Adam):
            raise InvariantError(
                f"--use-distributed-optimizer --optimizer {config.optimizer}",
                "only adam's state can be divided over data-parallel ranks",
                "drop --use-distributed-optimizer or use --optimizer adam",
            )
        super().__init__(optimizer, config, grad_scaler, init_state_fn)
        self.model_chunks = model_chunks
        self.ddp_config = model_chunks[0].ddp_config
        self.per_model_buffers = per_model_buffers
        self.buffers = [buffer for buffers in per_model_buffers.values() for buffer in buffers]
        self.data_parallel_group = data_parallel_group
        self.data_parallel_group_gloo = data_parallel_group_gloo
        self.data_parallel_group_idx = data_parallel_group_idx
        self.data_parallel_rank = 0 if data_parallel_group is None else data_parallel_group.rank()
        self.data_parallel_world_size = 1 if data_parallel_group is None else data_parallel_group.size()
        self._bucket_groups = self._own_bucket_groups()
        self._model_params = self.get_parameters()
        self.pieces: list[list[list[OwnedPiece]]] = [
            [
                [self._own(buffer.params[place.param], place) for place in shard.pieces]
                for shard in plan_shards(
                    buffer.layout, self.data_parallel_rank, self.data_parallel_world_size
                )
            ]
            for buffer in self.buffers
        ]
        self._fp8_weights = [
            weight for param in self._model_params if (weight := fp8_weights.of(param)) is not None
        ]
        self._owned = self.owned_pieces()
        self._gradients = [piece.of_gradient() for piece in self._owned]
        self._regroup()

    @staticmethod
    def _own(param: torch.nn.Parameter, place: Piece) -> OwnedPiece:
        part = fp8_weights.values_of(param).view(-1)[place.in_param.as_slice]
        return OwnedPiece(
            param, place, main_copy(param, part.clone().float() if _has_main_copy(param) else part)
        )

    def _regroup(self) -> None:
        """Put the owned pieces in the place of whole parameters in the torch optimizer's groups."""
        piece_of = {piece.param: piece for piece in self._owned}
        self._copied: list[OwnedPiece] = []
        for group in self.optimizer.param_groups:
            owned = [piece_of[param] for param in group["params"] if param in piece_of]
            copied = [piece for piece in owned if _has_main_copy(piece.param)]
            in_place = [piece for piece in owned if not _has_main_copy(piece.param)]
            group["params"] = [piece.main for piece in (*in_place, *copied)]
            self._copied += copied
        self._halves = [piece for piece in self._copied if fp8_weights.of(piece.param) is None]
        self._fp8_updates = [
            fp8_weights.Update(weight, piece.flat_slice, piece.main)
            for piece in self._copied
            if (weight := fp8_weights.of(piece.param)) is not None
        ]

    def _own_bucket_groups(self) -> list[_ParamAndGradBucketGroup]:
        """The bucket groups over this optimizer's buffers: an expert optimizer must not gather dense parameters."""
        own = {id(bucket) for buffer in self.buffers for bucket in buffer.buckets}
        return [
            group
            for chunk in self.model_chunks
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
            if any(id(bucket) in own for bucket in group.buckets)
        ]

    def owned_pieces(self) -> list[OwnedPiece]:
        """All pieces this rank owns, buffer by buffer, in memory order."""
        return [piece for buffer in self.pieces for bucket in buffer for piece in bucket]

    def get_model_parallel_group(self) -> ProcessGroup | None:
        """The whole world: every rank holds a different piece of every gradient."""
        return None

    def enable_pre_hook(self) -> None:
        """Gather parameters in forward (overlapped parameter gathering only)."""
        for chunk in self.model_chunks:
            chunk.enable_forward_pre_hook()

    def disable_pre_hook(self) -> None:
        """Gather parameters now and stop gathering them in forward."""
        for chunk in self.model_chunks:
            chunk.disable_forward_pre_hook()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what autograd left on the model, and the gradients of the pieces."""
        drop_grads(self._model_params, set_to_none)
        drop_grads(self.get_parameters(), set_to_none=True)

    def _copy_model_grads_to_main_grads(self) -> None:
        for piece, grad in zip(self._owned, self._gradients):
            piece.main.grad = grad.float() if grad.dtype in HALF else grad

    def _copy_main_params_to_model_params(self) -> None:
        if self._halves:
            torch._foreach_copy_(
                [piece.of_model() for piece in self._halves], [piece.main for piece in self._halves]
            )
        fp8_weights.update(self._fp8_weights, self._fp8_updates, self.data_parallel_group)

    @torch.no_grad()
    def _copy_model_params_to_main_params(self) -> None:
        if self._copied:
            torch._foreach_copy_(
                [piece.main for piece in self._copied], [piece.of_model() for piece in self._copied]
            )

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update the owned pieces and gather everyone's, or leave gathering to the next forward."""
        success = super().step_with_ready_grads()
        if self.ddp_config.overlap_param_gather:
            for group in self._bucket_groups:
                group.mark_params_stale()
        else:
            with timed(self.config, "params-all-gather"):
                for group in self._bucket_groups:
                    group.start_param_sync()
        return success

    # State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Groups without parameters, and the loss scale. The tensors are the parameter state, saved apart."""
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        return {"optimizer": {"param_groups": groups}, **self._scaler_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue groups and loss scale; and the tensors, if a distributed checkpoint brought them along."""
        self._load_groups(state_dict["optimizer"]["param_groups"])
        self.init_state_fn(self.optimizer)
        self._load_scaler_state(state_dict)
        for weight in self._fp8_weights:
            weight.given = None  # the main copies come from the checkpoint too
        if "param_state" in state_dict:
            self._load_sharded_parameter_state(state_dict)
