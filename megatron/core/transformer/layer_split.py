"""Which layers of a stack live on which pipeline stage and virtual chunk: integers only."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import TYPE_CHECKING

from megatron.core import parallel_state
from megatron.core.errors import InvariantError
from megatron.core.process_groups_config import ProcessGroupCollection

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

_SIZES = "--num-layers --pipeline-model-parallel-size"
_UNEVEN = "--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers"


@lru_cache(maxsize=64)
def layers_per_stage(
    num_layers: int,
    stages: int,
    first: int | None = None,
    last: int | None = None,
    standalone_embedding: bool = False,
) -> tuple[int, ...]:
    """Layers held by each of `stages` pipeline stages, all chunks of a stage together.

    `first` and `last` fix the outer stages, the others share the rest equally. With `standalone_embedding`
    stage 0 holds the embedding alone and the split is over the remaining stages. InvariantError if the rest does
    not divide.
    """
    if standalone_embedding:
        if stages < 2:
            raise InvariantError(
                "--standalone-embedding-stage",
                why="a stage of its own for the embedding needs at least two pipeline stages",
                fix="raise --pipeline-model-parallel-size or drop the flag",
            )
        return (0, *layers_per_stage(num_layers, stages - 1, first, last))
    if stages == 1:
        for fixed in (first, last):
            if fixed is not None and fixed != num_layers:
                raise InvariantError(
                    _UNEVEN,
                    why=f"one pipeline stage holds all {num_layers} layers, not {fixed}",
                    fix="drop the flag or raise --pipeline-model-parallel-size",
                )
        return (num_layers,)
    fixed_layers = (first or 0) + (last or 0)
    middle = stages - (first is not None) - (last is not None)
    rest = num_layers - fixed_layers
    if rest < 0 or (rest % middle if middle else rest):
        subject = _SIZES if first is None and last is None else f"{_SIZES} {_UNEVEN}"
        raise InvariantError(
            subject,
            why=f"{rest} of {num_layers} layers are left for {middle} of {stages} stages, which do not get the same number",
            fix="choose a number of layers that divides, or fix the first and last stage so that the rest does",
        )
    share = rest // middle if middle else 0
    head = () if first is None else (first,)
    tail = () if last is None else (last,)
    return (*head, *(share,) * middle, *tail)


@lru_cache(maxsize=64)
def split_layers(
    num_layers: int,
    stages: int,
    virtual: int = 1,
    first: int | None = None,
    last: int | None = None,
    standalone_embedding: bool = False,
) -> tuple[tuple[range, ...], ...]:
    """Global layer indices (from 0) as `result[chunk][stage]`.

    Chunks follow each other around the stages: chunk 0 of every stage, then chunk 1 of every stage, so a
    stage with n layers and v chunks holds n/v consecutive layers in each (interleaved schedule,
    arXiv:2104.04473). InvariantError if a stage's layers do not divide into its chunks.
    """
    per_stage = layers_per_stage(num_layers, stages, first, last, standalone_embedding)
    for stage, layers in enumerate(per_stage):
        if layers % virtual:
            raise InvariantError(
                "--num-layers-per-virtual-pipeline-stage",
                why=f"the {layers} layers of pipeline stage {stage} do not divide into {virtual} virtual chunks",
                fix="choose layers per virtual stage that divide every stage's share of --num-layers",
            )
    chunks: list[tuple[range, ...]] = []
    start = 0
    for _ in range(virtual):
        row: list[range] = []
        for layers in per_stage:
            row.append(range(start, start + layers // virtual))
            start += layers // virtual
        chunks.append(tuple(row))
    return tuple(chunks)


def layers_here(config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> range:
    """Global indices (from 0) of the layers of this rank's stage and current virtual chunk.

    `config.pipeline_model_parallel_size` counts the stages of this stack alone: behind an encoder with stages
    of its own the decoder's first stage is its stage 0. A configuration of one stage describes what this rank holds,
    whatever the pipeline (as in v0.9; a warning tells of it); InvariantError if there are others and this rank's
    stage lies outside them.
    """
    groups = parallel_state.resolve(pg_collection)
    stage = groups.rank("pp")
    encoder_stages = groups.layout.encoder_pp if groups.layout is not None else 0
    if stage >= encoder_stages:
        stage -= encoder_stages
    if stage >= config.pipeline_model_parallel_size == 1:
        warnings.warn(
            f"this rank is stage {stage} of a pipeline, but the configuration says one stage: all "
            f"{config.num_layers} layers are built here. Set its pipeline_model_parallel_size to divide them",
            stacklevel=2,
        )
        stage = 0
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    chunk = (parallel_state.get_virtual_pipeline_model_parallel_rank() or 0) if virtual > 1 else 0
    split = split_layers(
        config.num_layers,
        config.pipeline_model_parallel_size,
        virtual,
        config.first_pipeline_num_layers,
        config.last_pipeline_num_layers,
        config.standalone_embedding_stage,
    )
    if stage >= config.pipeline_model_parallel_size:
        raise InvariantError(
            "pipeline_model_parallel_size",
            why=f"this rank is stage {stage} of a pipeline, the config says {config.pipeline_model_parallel_size} stages",
            fix="give the config the pipeline size the process groups were made with",
        )
    return split[chunk][stage]
