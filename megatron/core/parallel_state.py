"""The classic accessors (`mpu.*`) over one current ProcessGroupCollection.

`initialize_model_parallel` plans a layout, opens its groups and makes them current. New code takes a collection as
an argument; the functions here serve user scripts and the few places where v0.9's names are the interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core import process_groups_config
from megatron.core.errors import ConfigError
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.topology import (  # noqa: F401  (v0.9 keeps these names here)
    EmbeddingRanks,
    Layout,
    RankGenerator,
    default_embedding_ranks,
    default_position_embedding_ranks,
    generate_masked_orthogonal_rank_groups,
)
from megatron.core.utils import GlobalMemoryBuffer

_NOT_READY = "{} is not initialized; call parallel_state.initialize_model_parallel() first"


@dataclass
class _State:
    """What is current: the groups, the virtual pipeline position, stage splits, scratch buffers, MoE losses."""

    collection: ProcessGroupCollection | None = None
    virtual_rank: int | None = None
    virtual_size: int | None = None
    split_rank: int | None = None
    decoder_start: int | None = None
    memory_buffer: GlobalMemoryBuffer | None = None
    moe_layer_wise_logging_tracker: dict[str, Any] = field(default_factory=dict)


_STATE = _State()


# The current collection -------------------------------------------------------------------------------------------


def set_current(collection: ProcessGroupCollection) -> None:
    """Make a collection the one that the accessors and new modules use."""
    _STATE.collection = collection


@contextmanager
def standing_at(
    collection: ProcessGroupCollection, virtual_rank: int | None = None, virtual_size: int | None = None
) -> Iterator[None]:
    """Inside the block be the rank that `collection` describes (by assumed sizes and ranks), to plan its model."""
    global _STATE
    before = _STATE
    _STATE = _State(collection, virtual_rank, virtual_size)
    if collection.layout is not None:
        _STATE.decoder_start = collection.layout.encoder_pp or None
    try:
        yield
    finally:
        _STATE = before


def get_current() -> ProcessGroupCollection:
    """The current collection; AssertionError before initialisation."""
    assert _STATE.collection is not None, _NOT_READY.format("model parallel group")
    return _STATE.collection


def resolve(collection: ProcessGroupCollection | None) -> ProcessGroupCollection:
    """The collection a module shall use: the given one, else the current one.

    Without torch.distributed that is a collection of one rank, so that a plain Python program can build layers.
    """
    if collection is not None:
        return collection
    if _STATE.collection is None and not dist.is_initialized():
        return ProcessGroupCollection()
    return get_current()


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    pipeline_model_parallel_split_rank: int | None = None,
    use_sharp: bool = False,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    nccl_communicator_config_path: str | None = None,
    distributed_timeout_minutes: int = 30,
    order: str = "tp-cp-ep-dp-pp",
    encoder_tensor_model_parallel_size: int | None = 0,
    encoder_pipeline_model_parallel_size: int | None = 0,
    get_embedding_ranks: EmbeddingRanks | None = None,
    get_position_embedding_ranks: EmbeddingRanks | None = None,
) -> None:
    """Divide the world among all kinds of parallelism and open the groups. All ranks must call.

    order: the axes, fastest varying rank first. nccl_communicator_config_path: YAML of communicator settings per
    group (`cga_cluster_size max_ctas min_ctas`). pipeline_model_parallel_split_rank: first decoder stage of an
    encoder-decoder model whose stages share one pipeline; encoder_*_size: an encoder with ranks of its own.

    RuntimeError for sizes that do not fit the world. use_sharp is refused: in-network reduction needs a
    cluster-specific start-up that this library does not perform.
    """
    assert dist.is_initialized(), "torch.distributed must be initialised before the model-parallel groups"
    if use_sharp:
        raise RuntimeError(
            "use_sharp: in-network reduction (SHARP) is not supported; drop the option, nccl uses the network's "
            "own settings (NCCL_COLLNET_ENABLE)"
        )
    if virtual_pipeline_model_parallel_size is not None and pipeline_model_parallel_size <= 1:
        raise RuntimeError("pipeline-model-parallel size should be greater than 1 with interleaved schedule")
    layout = Layout(
        world_size=dist.get_world_size(),
        tp=tensor_model_parallel_size,
        pp=pipeline_model_parallel_size,
        cp=context_parallel_size,
        ep=expert_model_parallel_size,
        order=order,
        encoder_tp=encoder_tensor_model_parallel_size or 0,
        encoder_pp=encoder_pipeline_model_parallel_size or 0,
        pp_split=pipeline_model_parallel_split_rank,
        embedding_ranks=get_embedding_ranks,
        position_embedding_ranks=get_position_embedding_ranks,
    )
    collection = _STATE.collection or ProcessGroupCollection()
    assert collection.layout is None, "model parallel groups are already initialized"
    settings = _read_nccl_settings(nccl_communicator_config_path)
    created = process_groups_config.create(
        layout,
        timeout=timedelta(minutes=distributed_timeout_minutes),
        options_for=(lambda kind: get_nccl_options(kind, settings)) if settings else None,
    )
    # Layers built before the groups existed (lazy initialisation) hold the collection that the setters made: it gets the
    # groups, and what it assumes stays in force.
    created.assumed_sizes, created.assumed_ranks = collection.assumed_sizes, collection.assumed_ranks
    vars(collection).update(vars(created))
    if virtual_pipeline_model_parallel_size is not None:
        _STATE.virtual_rank, _STATE.virtual_size = 0, virtual_pipeline_model_parallel_size
    _STATE.split_rank = pipeline_model_parallel_split_rank
    _STATE.decoder_start = layout.encoder_pp or None
    set_current(collection)


def destroy_model_parallel() -> None:
    """Close the groups and forget everything that `initialize_model_parallel` and the setters stored."""
    global _STATE
    if _STATE.collection is not None:
        _STATE.collection.destroy()
    _STATE = _State()


def _read_nccl_settings(path: str | None) -> dict[str, dict[str, int]]:
    """Settings by kind of group; ConfigError if the file holds something else, OSError if it cannot be read."""
    if path is None:
        return {}
    subject = f"nccl_communicator_config_path ({path})"
    try:
        import yaml  # optional: only this file format needs it
    except ImportError as error:
        raise ConfigError(subject, "reading YAML needs the package pyyaml", "pip install pyyaml") from error
    with open(path, encoding="utf-8") as stream:
        try:
            settings = yaml.safe_load(stream)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(subject, f"it is not YAML ({error})", "mend the file") from error
    if not isinstance(settings, dict) or not all(isinstance(group, dict) for group in settings.values()):
        raise ConfigError(subject, "it does not hold settings per group", "write, say, dp: {max_ctas: 16}")
    return settings


def get_nccl_options(pg_name: str, nccl_comm_cfgs: dict[str, dict[str, int]]) -> Any:
    """Backend options of the group `pg_name`, or None where nothing is configured for it."""
    if pg_name not in nccl_comm_cfgs:
        return None
    settings = nccl_comm_cfgs[pg_name]
    options = dist.ProcessGroupNCCL.Options()
    options.config.cga_cluster_size = settings.get("cga_cluster_size", 4)
    options.config.max_ctas = settings.get("max_ctas", 32)
    options.config.min_ctas = settings.get("min_ctas", 1)
    return options


def is_initialized() -> bool:
    """True once the data-parallel group exists."""
    return _STATE.collection is not None and _STATE.collection.dp is not None


def is_unitialized() -> bool:
    """The opposite of `is_initialized`, under the spelling that v0.9 gave it."""
    return not is_initialized()


def model_parallel_is_initialized() -> bool:
    """True once the tensor-, pipeline- and data-parallel groups exist."""
    return is_initialized()


# Groups -----------------------------------------------------------------------------------------------------------


def _group(kind: str, name: str, check_initialized: bool = True) -> Any:
    group = None if _STATE.collection is None else getattr(_STATE.collection, kind)
    assert group is not None or not check_initialized, _NOT_READY.format(f"{name} group")
    return group


def _ranks(kind: str, name: str) -> list[int]:
    assert _STATE.collection is not None and kind in _STATE.collection.ranks, _NOT_READY.format(
        f"{name} group"
    )
    return _STATE.collection.ranks[kind]


def get_model_parallel_group(with_expert_parallel: bool = False) -> ProcessGroup:
    """Ranks that hold one replica's parameters (tp x pp, with experts tp x ep x pp)."""
    return _group("tp_ep_pp" if with_expert_parallel else "mp", "model parallel")


def get_tensor_model_parallel_group(check_initialized: bool = True) -> ProcessGroup:
    """Ranks that share one layer's matrices."""
    return _group("tp", "tensor model parallel", check_initialized)


def get_pipeline_model_parallel_group() -> ProcessGroup | list[ProcessGroup]:
    """The stages of this rank's pipeline; a list where one encoder rank feeds several pipelines."""
    group = _group("pp", "pipeline_model parallel")
    pipelines = get_current().all_pipelines
    return [each for each, _ in pipelines if each is not None] if len(pipelines) > 1 else group


def get_data_parallel_group(with_context_parallel: bool = False) -> ProcessGroup:
    """Replicas of this rank's parameters, without or with the context-parallel ranks."""
    return _group("dp_cp" if with_context_parallel else "dp", "data parallel")


def get_data_parallel_group_gloo(with_context_parallel: bool = False) -> ProcessGroup:
    """The data-parallel group on gloo, for tensors in host memory."""
    return _group("dp_cp_gloo" if with_context_parallel else "dp_gloo", "data parallel gloo")


def get_context_parallel_group(check_initialized: bool = True) -> ProcessGroup:
    """Ranks that share one sequence."""
    return _group("cp", "context parallel", check_initialized)


def get_context_parallel_global_ranks(check_initialized: bool = True) -> list[int] | None:
    """Global ranks of the context-parallel group."""
    if not check_initialized and _STATE.collection is None:
        return None
    return _ranks("cp", "context parallel")


def get_embedding_group() -> ProcessGroup:
    """Pipeline ranks with a word embedding or its tied copy."""
    return _group("embd", "embedding")


def get_position_embedding_group() -> ProcessGroup:
    """Pipeline ranks with position embeddings."""
    return _group("pos_embd", "position embedding")


def get_amax_reduction_group(
    with_context_parallel: bool = False, tp_only_amax_red: bool = False
) -> ProcessGroup:
    """Ranks over which fp8 scales are reduced."""
    if tp_only_amax_red:
        return _group("tp_cp" if with_context_parallel else "tp", "FP8 amax reduction")
    return _group("tp_dp_cp" if with_context_parallel else "tp_dp", "FP8 amax reduction")


def get_tensor_and_data_parallel_group(with_context_parallel: bool = False) -> ProcessGroup:
    """Tensor- and data-parallel ranks of one pipeline stage."""
    return _group("tp_dp_cp" if with_context_parallel else "tp_dp", "tensor and data parallel")


def get_tensor_and_context_parallel_group() -> ProcessGroup:
    """Tensor- and context-parallel ranks of one stage."""
    return _group("tp_cp", "tensor and context parallel")


def get_expert_model_parallel_group() -> ProcessGroup:
    """Ranks among which the experts of a layer are divided."""
    return _group("ep", "expert model parallel")


def get_tensor_and_expert_parallel_group() -> ProcessGroup:
    """Tensor- and expert-parallel ranks of one layer."""
    return _group("tp_ep", "tensor and expert parallel")


def get_data_modulo_expert_parallel_group(with_context_parallel: bool = False) -> ProcessGroup:
    """Replicas of this rank's experts."""
    return _group(
        "dp_modulo_ep_cp" if with_context_parallel else "dp_modulo_ep", "data modulo expert parallel"
    )


def get_data_modulo_expert_parallel_group_gloo(with_context_parallel: bool = False) -> ProcessGroup:
    """Replicas of this rank's experts, on gloo."""
    kind = "dp_modulo_ep_cp_gloo" if with_context_parallel else "dp_modulo_ep_gloo"
    return _group(kind, "data modulo expert parallel gloo")


# Sizes and ranks; values set by hand win over those of the groups ---------------------------------------------------


def _assumed() -> ProcessGroupCollection:
    if _STATE.collection is None:
        set_current(ProcessGroupCollection())
    return get_current()


def _assume(table: dict[str, int], kind: str, value: int | None) -> None:
    if value is None:
        table.pop(kind, None)
    else:
        table[kind] = value


def set_expert_model_parallel_world_size(world_size: int | None) -> None:
    """Pretend this expert-parallel size (None: stop pretending)."""
    _assume(_assumed().assumed_sizes, "ep", world_size)


def set_tensor_model_parallel_world_size(world_size: int | None) -> None:
    """Pretend this tensor-parallel size (None: stop pretending)."""
    _assume(_assumed().assumed_sizes, "tp", world_size)


def set_pipeline_model_parallel_world_size(world_size: int | None) -> None:
    """Pretend this pipeline size (None: stop pretending)."""
    _assume(_assumed().assumed_sizes, "pp", world_size)


def set_virtual_pipeline_model_parallel_world_size(world_size: int | None) -> None:
    """Set the number of model chunks per rank."""
    _STATE.virtual_size = world_size


def set_expert_model_parallel_rank(rank: int | None) -> None:
    """Pretend this expert-parallel rank (None: stop pretending)."""
    _assume(_assumed().assumed_ranks, "ep", rank)


def set_tensor_model_parallel_rank(rank: int | None) -> None:
    """Pretend this tensor-parallel rank (None: stop pretending)."""
    _assume(_assumed().assumed_ranks, "tp", rank)


def set_pipeline_model_parallel_rank(rank: int | None) -> None:
    """Pretend this pipeline rank (None: stop pretending)."""
    _assume(_assumed().assumed_ranks, "pp", rank)


def set_data_parallel_rank(rank: int | None) -> None:
    """Pretend this data-parallel rank (None: stop pretending)."""
    _assume(_assumed().assumed_ranks, "dp", rank)


def set_pipeline_model_parallel_split_rank(rank: int | None) -> None:
    """Set the stage at which the decoder begins."""
    _STATE.split_rank = rank


def set_virtual_pipeline_model_parallel_rank(rank: int | None) -> None:
    """Set the model chunk that is being built or run."""
    _STATE.virtual_rank = rank


def _size(kind: str, name: str) -> int:
    current = _STATE.collection
    if current is not None and kind in current.assumed_sizes:
        return current.assumed_sizes[kind]
    return _group(kind, name).size()


def _rank(kind: str, name: str) -> int:
    current = _STATE.collection
    if current is not None and kind in current.assumed_ranks:
        return current.assumed_ranks[kind]
    return _group(kind, name).rank()


def get_tensor_model_parallel_world_size() -> int:
    """Ranks sharing one layer's matrices."""
    return _size("tp", "tensor model parallel")


def get_pipeline_model_parallel_world_size() -> int:
    """Stages of the pipeline."""
    return _size("pp", "pipeline_model parallel")


def get_tensor_model_parallel_rank() -> int:
    """This rank's index among the tensor-parallel ranks."""
    return _rank("tp", "tensor model parallel")


def get_pipeline_model_parallel_rank() -> int:
    """This rank's stage."""
    return _rank("pp", "pipeline_model parallel")


def get_pipeline_model_parallel_split_rank() -> int | None:
    """The stage at which the decoder begins, or None."""
    return _STATE.split_rank


def get_virtual_pipeline_model_parallel_rank() -> int | None:
    """The model chunk that is being built or run, or None without interleaving."""
    return _STATE.virtual_rank


def get_virtual_pipeline_model_parallel_world_size() -> int | None:
    """Model chunks per rank, or None without interleaving."""
    return _STATE.virtual_size


def get_data_parallel_world_size(with_context_parallel: bool = False) -> int:
    """Replicas (x context ranks); 0 without torch.distributed."""
    kind = "dp_cp" if with_context_parallel else "dp"
    return _size(kind, "data parallel") if dist.is_initialized() else 0


def get_data_parallel_rank(with_context_parallel: bool = False) -> int:
    """This rank's index among the replicas; 0 without torch.distributed."""
    current = _STATE.collection
    if current is not None and "dp" in current.assumed_ranks:
        return current.assumed_ranks["dp"]
    kind = "dp_cp" if with_context_parallel else "dp"
    return _rank(kind, "data parallel") if dist.is_initialized() else 0


def get_context_parallel_world_size() -> int:
    """Ranks sharing one sequence; 0 without torch.distributed."""
    return _size("cp", "context parallel") if dist.is_initialized() else 0


def get_context_parallel_rank() -> int:
    """This rank's part of the sequence; 0 without torch.distributed."""
    return _rank("cp", "context parallel") if dist.is_initialized() else 0


def get_tensor_and_context_parallel_world_size() -> int:
    """Tensor x context ranks; 0 without torch.distributed."""
    return _size("tp_cp", "tensor and context parallel") if dist.is_initialized() else 0


def get_tensor_and_context_parallel_rank() -> int:
    """This rank's index among the tensor x context ranks; 0 without torch.distributed."""
    return _rank("tp_cp", "tensor and context parallel") if dist.is_initialized() else 0


def get_expert_model_parallel_world_size() -> int:
    """Ranks among which the experts are divided; 0 without torch.distributed."""
    current = _STATE.collection
    if current is not None and "ep" in current.assumed_sizes:
        return current.assumed_sizes["ep"]
    return _size("ep", "expert model parallel") if dist.is_initialized() else 0


def get_expert_model_parallel_rank() -> int:
    """This rank's index among the expert-parallel ranks; 0 without torch.distributed."""
    current = _STATE.collection
    if current is not None and "ep" in current.assumed_ranks:
        return current.assumed_ranks["ep"]
    return _rank("ep", "expert model parallel") if dist.is_initialized() else 0


def get_tensor_and_expert_parallel_world_size() -> int:
    """Tensor x expert ranks; 0 without torch.distributed."""
    return _size("tp_ep", "tensor and expert parallel") if dist.is_initialized() else 0


def get_tensor_and_expert_parallel_rank() -> int:
    """This rank's index among the tensor x expert ranks; 0 without torch.distributed."""
    return _rank("tp_ep", "tensor and expert parallel") if dist.is_initialized() else 0


def get_data_modulo_expert_parallel_rank(with_context_parallel: bool = False) -> int:
    """This rank's index among the replicas of its experts; 0 without torch.distributed."""
    kind = "dp_modulo_ep_cp" if with_context_parallel else "dp_modulo_ep"
    return _rank(kind, "data modulo expert parallel") if dist.is_initialized() else 0


# Places in the pipeline -------------------------------------------------------------------------------------------


def is_pipeline_first_stage(ignore_virtual: bool = False) -> bool:
    """True on the first stage (and its first model chunk)."""
    if not ignore_virtual and _STATE.virtual_size is not None and _STATE.virtual_rank != 0:
        return False
    return get_pipeline_model_parallel_rank() == 0


def is_pipeline_last_stage(ignore_virtual: bool = False) -> bool:
    """True on the last stage (and its last model chunk)."""
    if (
        not ignore_virtual
        and _STATE.virtual_size is not None
        and _STATE.virtual_rank != _STATE.virtual_size - 1
    ):
        return False
    return get_pipeline_model_parallel_rank() == get_pipeline_model_parallel_world_size() - 1


def is_rank_in_embedding_group(ignore_virtual: bool = False) -> bool:
    """True if this rank (and model chunk) holds a word embedding or its tied copy."""
    if _STATE.collection is None or "embd" not in _STATE.collection.ranks:
        return False
    me, ranks = dist.get_rank(), _STATE.collection.ranks["embd"]
    if me not in ranks:
        return False
    if not ignore_virtual and me == ranks[0]:
        return is_pipeline_first_stage()
    if not ignore_virtual and me == ranks[-1]:
        return is_pipeline_last_stage()
    return True


def is_rank_in_position_embedding_group() -> bool:
    """True if this rank holds position embeddings."""
    if _STATE.collection is None:
        return False
    return dist.get_rank() in _STATE.collection.ranks.get("pos_embd", [])


def _stage_against(rank: int | None, edge: int | None) -> int:
    """Stage minus edge, or 0 where there is one stage or no edge."""
    if get_pipeline_model_parallel_world_size() == 1 or edge is None:
        return 0
    return (get_pipeline_model_parallel_rank() if rank is None else rank) - edge


def _has_edge(edge: int | None) -> bool:
    return get_pipeline_model_parallel_world_size() > 1 and edge is not None


def is_pipeline_stage_before_split(rank: int | None = None) -> bool:
    """True if the stage runs encoder layers (always, where there is no split)."""
    return not _has_edge(_STATE.split_rank) or _stage_against(rank, _STATE.split_rank) < 0


def is_pipeline_stage_after_split(rank: int | None = None) -> bool:
    """True if the stage runs decoder layers (always, where there is no split)."""
    return _stage_against(rank, _STATE.split_rank) >= 0


def is_inside_encoder(rank: int | None = None) -> bool:
    """True if the stage belongs to the encoder (always, where the encoder has no stages of its own)."""
    return not _has_edge(_STATE.decoder_start) or _stage_against(rank, _STATE.decoder_start) < 0


def is_inside_decoder(rank: int | None = None) -> bool:
    """True if the stage belongs to the decoder (always, where the encoder has no stages of its own)."""
    return _stage_against(rank, _STATE.decoder_start) >= 0


def is_pipeline_stage_at_split() -> bool:
    """True on the last encoder stage: it runs encoder layers and its successor decoder layers."""
    rank = get_pipeline_model_parallel_rank()
    return is_pipeline_stage_before_split(rank) and is_pipeline_stage_after_split(rank + 1)


def get_pipeline_model_parallel_decoder_start() -> int | None:
    """The stage at which a decoder with an encoder of its own stages begins, or None."""
    return _STATE.decoder_start


# Global ranks of neighbours and sources ---------------------------------------------------------------------------


def get_tensor_model_parallel_src_rank() -> int:
    """Global rank of the first tensor-parallel rank of this group."""
    return _ranks("tp", "tensor model parallel")[0]


def get_data_parallel_src_rank(with_context_parallel: bool = False) -> int:
    """Global rank of the first replica of this group."""
    return _ranks("dp_cp" if with_context_parallel else "dp", "data parallel")[0]


def get_pipeline_model_parallel_first_rank() -> int:
    """Global rank of the first stage of this pipeline."""
    return _ranks("pp", "pipeline parallel")[0]


def get_pipeline_model_parallel_last_rank() -> int:
    """Global rank of the last stage of this pipeline."""
    return _ranks("pp", "pipeline parallel")[-1]


def _pipeline_neighbour(step: int) -> int | list[int]:
    _ranks("pp", "pipeline parallel")
    stage, stages = get_pipeline_model_parallel_rank(), get_pipeline_model_parallel_world_size()
    neighbours = [ranks[(stage + step) % stages] for _, ranks in get_current().all_pipelines]
    return neighbours if len(neighbours) > 1 else neighbours[0]


def get_pipeline_model_parallel_next_rank() -> int | list[int]:
    """Global rank of the next stage (cyclic); a list where this rank feeds several pipelines."""
    return _pipeline_neighbour(1)


def get_pipeline_model_parallel_prev_rank() -> int | list[int]:
    """Global rank of the previous stage (cyclic); a list where this rank belongs to several pipelines."""
    return _pipeline_neighbour(-1)


# Scratch memory and logging ---------------------------------------------------------------------------------------


def get_global_memory_buffer() -> GlobalMemoryBuffer:
    """The pool of reusable communication buffers, made on first use."""
    if _STATE.memory_buffer is None:
        _STATE.memory_buffer = GlobalMemoryBuffer()
    return _STATE.memory_buffer


def destroy_global_memory_buffer() -> None:
    """Give the scratch buffers back."""
    _STATE.memory_buffer = None


def get_all_ranks() -> str:
    """This rank's tensor, data, context, pipeline and expert ranks, joined by underscores."""
    ranks = (
        get_tensor_model_parallel_rank(),
        get_data_parallel_rank(),
        get_context_parallel_rank(),
        get_pipeline_model_parallel_rank(),
        get_expert_model_parallel_rank(),
    )
    return "_".join(str(rank) for rank in ranks)


def get_moe_layer_wise_logging_tracker() -> dict[str, dict[str, torch.Tensor]]:
    """Auxiliary losses of the MoE layers, collected between two log lines."""
    return _STATE.moe_layer_wise_logging_tracker
