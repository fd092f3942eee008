"""How the distributed optimizer's tensors are stored: in model space, in bucket space, or gathered on one rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing.agreement import together
from megatron.core.dist_checkpointing.durable import save_file
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map
from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.distributed.buckets import BucketPlan
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer, layout_of
from megatron.core.errors import CheckpointError
from megatron.core.optimizer.optimizer import InitState, match_param_groups, portable_groups

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.distrib_optimizer import OwnedPiece

STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")
SHARDING_TYPES = ("fully_sharded_model_space", "fully_sharded_bucket_space", "dp_zero_gather_scatter")


def write_parameter_state(state: Any, filename: str | Path) -> None:
    """Write a parameter state file: to a temporary name, flushed, then renamed."""
    partial = f"{filename}.partial"
    save_file(state, partial)
    os.replace(partial, filename)


def read_parameter_state(filename: str | Path) -> Any:
    """Read a parameter state file, refusing everything but plain data."""
    return load_file(filename)


class ParameterStateFormats:
    """The part of the distributed optimizer that turns its tensors into checkpoints and back.

    Methods without `sharded` in their name move data and must be called by all ranks of the data-parallel group.
    """

    optimizer: torch.optim.Optimizer
    init_state_fn: InitState
    model_chunks: list[DistributedDataParallel]
    per_model_buffers: dict[int, list[_ParamAndGradBuffer]]
    buffers: list[_ParamAndGradBuffer]
    pieces: list[list[list[OwnedPiece]]]
    data_parallel_group: ProcessGroup | None
    data_parallel_group_gloo: ProcessGroup | None
    data_parallel_group_idx: int
    data_parallel_rank: int
    data_parallel_world_size: int
    state_dict: Callable[[], dict[str, Any]]
    owned_pieces: Callable[[], list[OwnedPiece]]

    # Shared ------------------------------------------------------------------------------------------------------

    def _load_groups(self, stored: list[dict[str, Any]]) -> None:
        groups = match_param_groups(self.optimizer.param_groups, stored, by_identity=True)
        for own, group in zip(self.optimizer.param_groups, groups):
            own.update(group)

    def _tensors(self, piece: OwnedPiece) -> dict[str, Tensor]:
        """What is stored of a piece: values and moments, each 1-D."""
        state = self.optimizer.state[piece.main]
        return {"param": piece.main.detach(), **{key: state[key] for key in STATE_KEYS[1:]}}

    def _buckets(self) -> Iterator[tuple[int, int, _ParamAndGradBuffer, BucketPlan, list[OwnedPiece]]]:
        """(buffer index, bucket index, buffer, bucket, owned pieces) of every bucket."""
        for buffer_index, (buffer, buckets) in enumerate(zip(self.buffers, self.pieces)):
            for bucket_index, (plan, pieces) in enumerate(zip(buffer.layout.buckets, buckets)):
                yield buffer_index, bucket_index, buffer, plan, pieces

    def _shard_of_bucket(
        self, key: str, buffer: _ParamAndGradBuffer, plan: BucketPlan, pieces: list[OwnedPiece]
    ) -> Tensor:
        """This rank's part of a bucket in host memory, zeros between the pieces."""
        dtype = torch.promote_types(buffer.param_dtype, torch.float32)
        shard = torch.zeros(plan.numel // self.data_parallel_world_size, dtype=dtype)
        for piece in pieces:
            shard[piece.place.in_shard.start : piece.place.in_shard.end].copy_(self._tensors(piece)[key])
        return shard

    def _fill_from_shard(self, key: str, shard: Tensor, pieces: list[OwnedPiece]) -> None:
        for piece in pieces:
            self._tensors(piece)[key].copy_(shard[piece.place.in_shard.start : piece.place.in_shard.end])

    # Gathered on data-parallel rank 0 -----------------------------------------------------------------------------

    @torch.no_grad()
    def get_parameter_state_dp_zero(self) -> dict[Any, Any] | None:
        """All tensors of the group, in host memory of its rank 0; None on the others.

        `{"buckets_coalesced": True, buffer index: {(param dtype, grad dtype): {"param" | "exp_avg" | "exp_avg_sq": 1-D,
        "numel_unpadded": int}}}`, buckets one after the other without the filling at their ends.
        """
        self.init_state_fn(self.optimizer)
        collected: list[dict[str, list[Tensor]]] = [{key: [] for key in STATE_KEYS} for _ in self.buffers]
        for buffer_index, _, buffer, plan, pieces in self._buckets():
            for key in STATE_KEYS:
                whole = self._gather(self._shard_of_bucket(key, buffer, plan, pieces))
                if whole is not None:
                    collected[buffer_index][key].append(whole[: plan.numel_unpadded])
        if self.data_parallel_rank != 0:
            return None
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for buffer_index, (buffer, parts) in enumerate(zip(self.buffers, collected)):
            entry: dict[str, Any] = {key: torch.cat(parts[key]) for key in STATE_KEYS}
            entry["numel_unpadded"] = buffer.numel_unpadded
            state[buffer_index] = {(buffer.param_dtype, buffer.grad_dtype): entry}
        return state

    def _gather(self, shard: Tensor) -> Tensor | None:
        """The parts of all ranks, joined, on rank 0 of the group; None elsewhere."""
        if self.data_parallel_world_size == 1:
            return shard
        group = self.data_parallel_group_gloo
        assert group is not None, "gathering in host memory needs the gloo twin of the data-parallel group"
        parts = None
        if self.data_parallel_rank == 0:
            parts = [torch.empty_like(shard) for _ in range(self.data_parallel_world_size)]
        dist.gather(shard, parts, dst=dist.get_global_rank(group, 0), group=group)
        return None if parts is None else torch.cat(parts)

    def _scatter(self, whole: Tensor | None, shard: Tensor) -> Tensor:
        """Fill `shard` with this rank's part of what rank 0 of the group holds."""
        if self.data_parallel_world_size == 1:
            assert whole is not None, "the only rank holds the data"
            return whole
        group = self.data_parallel_group_gloo
        assert group is not None, "scattering from host memory needs the gloo twin of the data-parallel group"
        parts = None if whole is None else list(whole.view(self.data_parallel_world_size, -1).unbind())
        dist.scatter(shard, parts, src=dist.get_global_rank(group, 0), group=group)
        return shard

    def save_parameter_state(self, filename: str | Path) -> None:
        """Write the gathered state to one file, from rank 0 of the group."""
        state = self.get_parameter_state_dp_zero()
        if state is not None:
            write_parameter_state(state, filename)

    def load_parameter_state(self, filename: str | Path, *, update_legacy_format: bool = False) -> None:
        """Read the file on rank 0 of the group and hand every rank its part."""
        state = read_parameter_state(filename) if self.data_parallel_rank == 0 else None
        self.load_parameter_state_from_dp_zero(state, update_legacy_format=update_legacy_format)

    def load_parameter_state_from_dp_zero(
        self, state_dict: dict[Any, Any] | None, *, update_legacy_format: bool = False
    ) -> None:
        """Spread a gathered state (given on rank 0 of the group) over the ranks, whatever their number when it was made.

        All ranks of the world must call.
        `update_legacy_format` allows files that hold a list of tensors per bucket and cuts them anew.
        """
        whole: dict[tuple[int, str], Tensor] = {}
        with together():
            if self.data_parallel_rank == 0:
                assert state_dict is not None, "rank 0 of the data-parallel group must be given the state"
                whole = self._whole_buffers(state_dict, update_legacy_format)
        self._spread(whole)

    def load_parameter_state_from_dp_zero_legacy(self, state_dict: dict[Any, Any] | None) -> None:
        """Spread a gathered state that holds a list of tensors per bucket."""
        self.load_parameter_state_from_dp_zero(state_dict, update_legacy_format=True)

    @torch.no_grad()
    def _spread(self, whole: dict[tuple[int, str], Tensor]) -> None:
        self.init_state_fn(self.optimizer)
        offsets = [0] * len(self.buffers)
        for buffer_index, _, buffer, plan, pieces in self._buckets():
            start = offsets[buffer_index]
            offsets[buffer_index] += plan.numel_unpadded
            for key in STATE_KEYS:
                bucket = None
                if self.data_parallel_rank == 0:
                    stored = whole[buffer_index, key][start : start + plan.numel_unpadded]
                    bucket = torch.nn.functional.pad(stored, (0, plan.numel - plan.numel_unpadded))
                shard = self._shard_of_bucket(key, buffer, plan, [])
                if bucket is not None:
                    bucket = bucket.to(shard.dtype)
                self._fill_from_shard(key, self._scatter(bucket, shard), pieces)

    def _whole_buffers(
        self, state_dict: dict[Any, Any], update_legacy_format: bool
    ) -> dict[tuple[int, str], Tensor]:
        """The 1-D tensor of each (buffer, state key) in a gathered state, checked against this model."""
        legacy = not state_dict.get("buckets_coalesced", False)
        if legacy and not update_legacy_format:
            raise CheckpointError(
                "distributed optimizer state",
                "the file has the layout from before February 2024 (one tensor per bucket)",
                "add --ckpt-convert-update-legacy-dist-opt-format",
            )
        if not legacy:
            self.split_state_dict_if_needed(state_dict)
        whole = {}
        for buffer_index, buffer in enumerate(self.buffers):
            entries = state_dict.get(buffer_index)
            if entries is None:
                raise CheckpointError(
                    "distributed optimizer state",
                    f"the file has {sum(isinstance(key, int) for key in state_dict)} gradient buffers, "
                    f"this model {len(self.buffers)}",
                    "use the precision and pipeline flags of the checkpoint, or --no-load-optim",
                )
            entry = entries.get((buffer.param_dtype, buffer.grad_dtype))
            if entry is None:
                # What is stored is fp32 whatever the model's precision was.
                (entry,) = entries.values() if len(entries) == 1 else ({},)
            for key in STATE_KEYS:
                if key not in entry:
                    raise CheckpointError(
                        "distributed optimizer state",
                        f"buffer {buffer_index} holds {list(entries)}, not {(buffer.param_dtype, buffer.grad_dtype)}",
                        "use the precision flags of the checkpoint, or --no-load-optim",
                    )
                stored = torch.cat(entry[key]) if legacy else entry[key]
                if stored.numel() != buffer.numel_unpadded:
                    raise CheckpointError(
                        "distributed optimizer state",
                        f"buffer {buffer_index} has {stored.numel()} elements in the file, "
                        f"{buffer.numel_unpadded} in this model",
                        "keep tensor- and pipeline-parallel sizes, or convert to --ckpt-format torch_dist first",
                    )
                whole[buffer_index, key] = stored
        return whole

    def split_state_dict_if_needed(self, state_dict: dict[Any, Any]) -> None:
        """Divide the one buffer that a gathered state has for each chunk among this model's several, in place.

        Buffers are told apart by the parameters' dtype, so a run with `fp8_param_gather` has one more than the run
        before it. Nothing happens to a state whose buffers this model has, or would not have had either.
        """
        stored = sorted(key for key in state_dict if isinstance(key, int))
        chunks = list(zip(self.model_chunks, self.per_model_buffers.values()))
        if len(stored) != len(chunks) or len(stored) == len(self.buffers):
            return
        divided: dict[int, Any] = {}
        for number, (chunk, buffers) in zip(stored, chunks):
            params = [
                param for param in chunk.param_to_name if any(param in b.param_index_map for b in buffers)
            ]
            joint = layout_of(params, chunk.bucket_size, self.data_parallel_world_size, sharded=True)
            start_of = dict(zip(params, joint.stored_starts()))
            (entry,) = state_dict[number].values()
            if entry["numel_unpadded"] != joint.numel_unpadded:
                return
            for buffer in buffers:
                part: dict[str, Any] = {"numel_unpadded": buffer.numel_unpadded}
                for key in STATE_KEYS:
                    part[key] = entry[key].new_zeros(buffer.numel_unpadded)
                    for param, start in zip(buffer.params, buffer.layout.stored_starts()):
                        source = entry[key][start_of[param] : start_of[param] + param.numel()]
                        part[key][start : start + param.numel()] = source
                divided[len(divided)] = {(buffer.param_dtype, buffer.grad_dtype): part}
        state_dict.update(divided)

    # Distributed formats ------------------------------------------------------------------------------------------

    def sharded_state_dict(
        self,
        model_sharded_state_dict: ShardedStateDict,
        is_loading: bool = False,
        sharding_type: str | None = "fully_sharded_model_space",
    ) -> ShardedStateDict:
        """The state for a distributed checkpoint, tensors described in one of SHARDING_TYPES.

        Model space can be loaded into any layout; gathering writes one object per model-parallel shard; bucket space needs
        the same buckets and is kept to read old checkpoints.
        """
        sharding_type = sharding_type or SHARDING_TYPES[0]
        if is_loading:
            self.init_state_fn(self.optimizer)
        state_dict = self.state_dict()
        groups = state_dict["optimizer"]["param_groups"]
        state_dict["optimizer"]["param_groups"] = portable_groups(groups)
        if sharding_type == "fully_sharded_model_space":
            param_state: Any = self.sharded_param_state_fs_model_space(model_sharded_state_dict, is_loading)
        elif sharding_type == "dp_zero_gather_scatter":
            state_dict = {key: self._object(key, value) for key, value in state_dict.items()}
            param_state = self.sharded_param_state_dp_zero(model_sharded_state_dict, is_loading)
        elif sharding_type == "fully_sharded_bucket_space":
            param_state = self.sharded_param_state_fs_bucket_space(model_sharded_state_dict, is_loading)
        else:
            raise ValueError(f"sharding_type is {sharding_type!r}; use one of {SHARDING_TYPES}")
        return {**state_dict, "param_state": param_state, "param_state_sharding_type": sharding_type}

    def _load_sharded_parameter_state(self, state_dict: dict[str, Any]) -> None:
        """Take over the tensors that `sharded_state_dict` asked for and a checkpoint filled in."""
        load = {
            "fully_sharded_model_space": self.load_parameter_state_from_fs_model_space,
            "dp_zero_gather_scatter": self.load_parameter_state_from_dp_zero,
            "fully_sharded_bucket_space": self.load_parameter_state_from_fs_bucket_space,
        }
        load[state_dict["param_state_sharding_type"]](state_dict["param_state"])

    def _object(self, name: str, value: Any) -> ShardedObject:
        """An object that exists once per model-parallel shard and is written by data-parallel rank 0."""
        key = f"optimizer.distributed.dp_group_idx_{self.data_parallel_group_idx}.{name}"
        return ShardedObject(key, value, (1,), (0,), replica_id=self.data_parallel_rank)

    def sharded_param_state_dp_zero(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False
    ) -> ShardedObject | LocalNonpersistentObject:
        """The gathered state as an object of data-parallel rank 0. All ranks of the group must call when saving."""
        state = None if is_loading else self.get_parameter_state_dp_zero()
        return (
            LocalNonpersistentObject(None) if self.data_parallel_rank else self._object("param_state", state)
        )

    def sharded_param_state_fs_model_space(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False
    ) -> dict[int, dict[str, Any]]:
        """Every owned piece as a flat slice of its model tensor: `optimizer.state.<key>.<model key>`."""
        self.init_state_fn(self.optimizer)
        owned = self.owned_pieces()
        sharded_params = get_param_id_to_sharded_param_map(
            model_sharded_state_dict, (piece.param for piece in owned)
        )
        result: dict[int, dict[str, Any]] = {}
        for number, piece in enumerate(owned):
            twin = sharded_params[number]
            if not isinstance(twin, (ShardedTensor, ShardedTensorFactory)):
                raise CheckpointError(
                    f"optimizer state of {getattr(twin, 'key', number)}",
                    f"a {type(twin).__name__} cannot be cut into optimizer shards",
                    "describe the parameter by a ShardedTensor or ShardedTensorFactory",
                )
            result[number] = {}
            for key, tensor in self._tensors(piece).items():
                key = "fp32_param" if key == "param" else key
                changes: dict[str, Any] = {
                    "key": f"optimizer.state.{key}.{twin.key}",
                    "data": tensor,
                    "flattened_range": piece.flat_slice,
                    "replica_id": _first_data_parallel_replica(twin.replica_id),
                }
                if isinstance(twin, ShardedTensor):
                    # A padded vocabulary may change for weights, but a slice of a flat piece says nothing about rows.
                    changes.update(dtype=tensor.dtype, allow_shape_mismatch=False)
                result[number][key] = replace(twin, **changes)
        return result

    @torch.no_grad()
    def load_parameter_state_from_fs_model_space(self, state_dict: dict[int, dict[str, Tensor]]) -> None:
        """Take over tensors described by `sharded_param_state_fs_model_space`."""
        for number, piece in enumerate(self.owned_pieces()):
            for key, tensor in self._tensors(piece).items():
                tensor.copy_(state_dict[number]["fp32_param" if key == "param" else key])

    def get_parameter_state_fs_bucket_space(self) -> dict[Any, Any]:
        """This rank's part of every bucket: `{"per_bucket_numel": .., "per_bucket_numel_unpadded": .., buffer index:
        {(param dtype, grad dtype): [one {"param", "exp_avg", "exp_avg_sq"} of 1-D tensors per bucket]}}`."""
        self.init_state_fn(self.optimizer)
        state: dict[Any, Any] = {
            f"per_bucket_{count}": [
                {
                    (buffer.param_dtype, buffer.grad_dtype): [
                        getattr(plan, count) for plan in buffer.layout.buckets
                    ]
                }
                for buffer in self.buffers
            ]
            for count in ("numel", "numel_unpadded")
        }
        for buffer_index, _, buffer, plan, pieces in self._buckets():
            parts = state.setdefault(buffer_index, {(buffer.param_dtype, buffer.grad_dtype): []})
            parts[buffer.param_dtype, buffer.grad_dtype].append(
                {key: self._shard_of_bucket(key, buffer, plan, pieces) for key in STATE_KEYS}
            )
        return state

    def sharded_param_state_fs_bucket_space(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False
    ) -> dict[Any, Any]:
        """Every bucket as a 1-D tensor cut over the data-parallel ranks; the numbers of elements as objects."""
        state = self.get_parameter_state_fs_bucket_space()
        prefix = f"optimizer.distributed.dp_group_idx_{self.data_parallel_group_idx}"
        for count in ("per_bucket_numel", "per_bucket_numel_unpadded"):
            state[count] = self._object(count, state[count])
        for buffer_index in range(len(self.buffers)):
            for dtypes, buckets in state[buffer_index].items():
                for bucket_index, bucket in enumerate(buckets):
                    place = f"{prefix}.gbuf_idx_{buffer_index}.dtype_{dtypes}.bucket_idx_{bucket_index}"
                    for key, tensor in bucket.items():
                        # The filling at a bucket's end depends on the number of ranks.
                        bucket[key] = ShardedTensor.from_rank_offsets(
                            f"{place}.{key}",
                            tensor,
                            (0, self.data_parallel_rank, self.data_parallel_world_size),
                            allow_shape_mismatch=True,
                        )
        return state

    @torch.no_grad()
    def load_parameter_state_from_fs_bucket_space(self, state_dict: dict[Any, Any]) -> None:
        """Take over tensors described by `sharded_param_state_fs_bucket_space`."""
        for buffer_index, bucket_index, buffer, _, pieces in self._buckets():
            bucket = state_dict[buffer_index][buffer.param_dtype, buffer.grad_dtype][bucket_index]
            for key in STATE_KEYS:
                self._fill_from_shard(key, bucket[key], pieces)


def _first_data_parallel_replica(replica_id: Any) -> Any:
    """A shard exists on one data-parallel rank only, so it is the first replica there."""
    assert isinstance(replica_id, tuple) and len(replica_id) == 3, (
        f"replica ids are (pipeline, tensor, data parallel), not {replica_id!r}"
    )
    return (*replica_id[:2], 0)
