"""The parameters of every rank, from the real model classes built on the meta device: shapes without data."""

from __future__ import annotations

import contextlib
import importlib
import io
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from megatron.core import device, parallel_state
from megatron.core.enums import ModelType
from megatron.core.errors import FlagError
from megatron.core.kernels import capability, registry
from megatron.core.kernels.capability import Capabilities
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_block import MambaStack
from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols, layer_kinds
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.ssm.sections import MixerSizes
from megatron.core.tensor_parallel.layers import fp8_layers
from megatron.core.timers import Timers
from megatron.core.topology import Layout
from megatron.core.transformer.layer_split import split_layers
from megatron.training import global_vars
from megatron.training.config import rules
from megatron.training.context import TrainContext


@dataclass(frozen=True)
class Parameter:
    """One tensor of one rank. `whole`: the same on all tensor-parallel ranks; `tied`: other stages hold it too; `shared`:
    and this is a copy; `fp8`: the weight of an fp8 layer."""

    name: str
    numel: int
    whole: bool = False
    tied: bool = False
    shared: bool = False
    expert: bool = False
    fp8: bool = False


@dataclass(frozen=True)
class Mixer:
    """One rank's part of the mixer of a Mamba layer. `recomputed`: between its projections it keeps nothing."""

    sizes: MixerSizes
    taps: int
    chunk: int
    normed: bool
    recomputed: bool


@dataclass(frozen=True)
class Chunk:
    """The model part of one (stage, chunk): its layers as (encoder, decoder) counts, which ends it holds, its tensors.

    In a hybrid model `kinds` says layer by layer which is of which kind, and `mixer` what Mamba layers are made of.
    """

    encoder_layers: int
    decoder_layers: int
    embeds: bool
    scores: bool
    parameters: tuple[Parameter, ...]
    kinds: str = ""
    mixer: Mixer | None = None

    @property
    def numel(self) -> int:
        """Elements on one rank."""
        return sum(p.numel for p in self.parameters)

    @property
    def fp8_layers(self) -> int:
        """Layers whose products are in fp8."""
        return sum(p.fp8 and p.name.endswith("linear_fc2.weight") for p in self.parameters)


Stages = tuple[tuple[Chunk, ...], ...]


def stages_of(args: Namespace) -> int:
    """Pipeline stages, those of an encoder with its own included."""
    return args.encoder_pipeline_model_parallel_size + args.pipeline_model_parallel_size


def build(args: Namespace, script: str, machine: Capabilities) -> tuple[Stages, list[registry.Choice]]:
    """The entry script's model as `stages[stage][chunk]`, and the kernels it chooses on `machine`.

    Equal chunks are built once, so the cost does not grow with the pipeline.
    """
    module = importlib.import_module(script)
    encoder_decoder = script == "pretrain_t5"
    if not encoder_decoder:
        rules.check(args, rules.ONE_STACK)
    kinds = _kinds(args) if script == "pretrain_mamba" else ""
    stages, chunks = stages_of(args), args.virtual_pipeline_model_parallel_size or 1
    built: dict[_Part, Chunk] = {}
    result = []
    bare = Namespace(**{**vars(args), "perform_initialization": False, "rank": 1})
    bare.model_type = ModelType.encoder_and_decoder if encoder_decoder else ModelType.encoder_or_decoder
    with _without_machine(bare, machine) as choices:
        for stage in range(stages):
            row = []
            for chunk in range(chunks):
                part = _part(args, stage, chunk, encoder_decoder, kinds)
                if part not in built:
                    own = (
                        {"add_encoder": part.encoder > 0, "add_decoder": part.decoder > 0}
                        if encoder_decoder
                        else {}
                    )
                    virtual = (chunk, chunks) if chunks > 1 else (None, None)
                    with parallel_state.standing_at(place_of(args, stage), *virtual):
                        model = module.model_provider(pre_process=part.first, post_process=part.last, **own)
                    built[part] = _chunk(part, model)
                row.append(built[part])
            result.append(tuple(row))
    return tuple(result), list(choices.values())


class _Part(NamedTuple):
    """What a chunk holds: encoder and decoder layers; is it first, is it last, as the provider is told; does it embed and
    score; the kinds of a hybrid's layers."""

    encoder: int
    decoder: int
    first: bool
    last: bool
    embeds: bool
    scores: bool
    kinds: str = ""


def _part(args: Namespace, stage: int, chunk: int, encoder_decoder: bool, kinds: str) -> _Part:
    stages, chunks = stages_of(args), args.virtual_pipeline_model_parallel_size or 1
    if not encoder_decoder:
        layers = _split(args, args.num_layers, stages, chunks)[chunk][stage]
        first = stage == 0 and chunk == 0
        last = stage == stages - 1 and chunk == chunks - 1
        return _Part(0, len(layers), first, last, first, last, kinds[layers.start : layers.stop])
    own = args.encoder_pipeline_model_parallel_size
    depth = args.num_layers if args.decoder_num_layers is None else args.decoder_num_layers
    encoder_here, decoder_here = stage < own or stages == 1, stage >= own
    encoder = args.encoder_num_layers // max(own, 1) if encoder_here else 0
    decoder = len(_split(args, depth, stages - own, 1)[0][stage - own]) if decoder_here else 0
    last = stage == stages - 1
    return _Part(encoder, decoder, stage in (0, own), stage in (own - 1, stages - 1), stage in (0, own), last)


def _kinds(args: Namespace) -> str:
    """The kind of every layer of a hybrid model, as letters of `Symbols`."""
    rules.check(args, rules.HYBRID)
    ratios = (args.hybrid_attention_ratio, args.hybrid_mlp_ratio)
    return "".join(layer_kinds(args.num_layers, *ratios, args.hybrid_override_pattern))


def _chunk(part: _Part, model: torch.nn.Module) -> Chunk:
    """What the built model says about itself. FlagError for a hybrid's layers whose work is not known."""
    mixer = None
    if part.kinds:
        known = isinstance(model.decoder, MambaStack) and "".join(model.decoder.layer_type_list) == part.kinds
        mixer = next((_mixer(each) for each in model.modules() if isinstance(each, MambaMixer)), None)
        if not known or (Symbols.MAMBA in part.kinds and mixer is None):
            raise FlagError(
                "--spec",
                "what its layers compute is not known: they are not made of this library's MambaStack and MambaMixer",
                "explain a stack of those and start this one: a few iterations tell",
            )
    return Chunk(part.encoder, part.decoder, part.embeds, part.scores, _parameters(model), part.kinds, mixer)


def _mixer(built: MambaMixer) -> Mixer:
    return Mixer(built.local, built.d_conv, built.chunk_size, built.norm is not None, built.use_mem_eff_path)


def _split(args: Namespace, layers: int, stages: int, chunks: int) -> tuple[tuple[range, ...], ...]:
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    return split_layers(layers, stages, chunks, first, last, args.standalone_embedding_stage)


class _NoRandomness(TorchFunctionMode):
    """Leaves out random filling, which means nothing on the meta device but loads torch's compiler (a second)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.init.normal_, torch.Tensor.normal_):
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _without_machine(args: Namespace, machine: Capabilities) -> Iterator[dict[Any, registry.Choice]]:
    """A context for the model provider, a device without data, kernels that are chosen but not loaded, and silence."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(capability.pretend(machine))
        stack.enter_context(device.planning("cuda" if machine.has_cuda else "cpu"))
        choices = stack.enter_context(registry.planning())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_NoRandomness())
        stack.enter_context(global_vars.using(TrainContext(args, Timers(0, "minmax"))))
        yield choices


def place_of(args: Namespace, stage: int) -> ProcessGroupCollection:
    """The first rank of a pipeline stage, by its sizes and ranks alone."""
    tp, cp, ep = (
        args.tensor_model_parallel_size,
        args.context_parallel_size,
        args.expert_model_parallel_size,
    )
    own = args.encoder_pipeline_model_parallel_size
    if stage < own:
        tp = args.encoder_tensor_model_parallel_size or tp  # a split rank leaves it open: like the decoder
    sizes = {"tp": tp, "pp": stages_of(args), "cp": cp, "dp": args.data_parallel_size, "ep": ep}
    sizes |= {"tp_ep": tp * ep, "tp_cp": tp * cp, "dp_cp": args.data_parallel_size * cp}
    layout = Layout(
        args.world_size,
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        cp,
        ep,
        encoder_tp=args.encoder_tensor_model_parallel_size,
        encoder_pp=own,
    )
    ranks = {**dict.fromkeys(sizes, 0), "pp": stage}
    return ProcessGroupCollection(layout=layout, assumed_sizes=sizes, assumed_ranks=ranks)


def _parameters(model: torch.nn.Module) -> tuple[Parameter, ...]:
    """What the model says about its tensors, by the classic attributes."""
    in_fp8 = {layer.weight for layer, _ in fp8_layers(model)}
    return tuple(
        Parameter(
            name,
            param.numel(),
            fp8=param in in_fp8,
            whole=not getattr(param, "tensor_model_parallel", False),
            tied=getattr(param, "shared_embedding", False),
            shared=getattr(param, "shared", False),
            expert=not getattr(param, "allreduce", True),
        )
        for name, param in model.named_parameters()
    )


def total(stages: Stages, args: Namespace) -> int:
    """Parameters of the whole model: pieces of all ranks, copies counted once."""
    count = 0
    for stage, chunks in enumerate(stages):
        tp = place_of(args, stage).size("tp")
        for chunk in chunks:
            for param in chunk.parameters:
                pieces = 1 if param.whole else tp
                experts = args.expert_model_parallel_size if param.expert else 1
                count += 0 if param.shared else param.numel * pieces * experts
    return count
