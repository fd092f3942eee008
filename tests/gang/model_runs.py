"""One microbatch through a model cut over ranks, and the same parameters and gradients cut from one
process's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.sections import cut_sections
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_layer import TransformerLayer
from tests.unit.models import recorded


@dataclass(frozen=True)
class Cut:
    """How a recorded model is cut: sizes of the axes and what else its configuration changes."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1  # every expert parallel rank is fed the same batch
    sequence_parallel: bool = False
    encoder_pp: int = 0
    join_positions: bool = True  # sum the position table's gradient over its holders
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        changed = [f for f in fields(self) if f.name != "changes" and getattr(self, f.name) != f.default]
        return " ".join(
            [*(f"{f.name}={getattr(self, f.name)}" for f in changed), *map(str, self.changes.values())]
        )

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.ep * (self.pp + self.encoder_pp)


def reference(name: str, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The recorded model in one process and float64: its parameters, its gradients and its results."""
    model = recorded.build(name, recorded.config_of(name, **changes)).double()
    model.load_state_dict(recorded.weights(name))
    result = recorded.run(name, model, _double(recorded.arrays(name, "batch.npz")))
    result["loss"].backward()
    named = dict(model.named_parameters())
    gradients = {key: p.grad for key, p in named.items() if p.grad is not None}
    return (
        {key: p.detach() for key, p in named.items()},
        gradients,
        {key: value.detach() for key, value in result.items()},
    )


def _double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def run_cut(
    name: str, cut: Cut, weights: dict[str, Tensor], gradients: dict[str, Tensor] | None
) -> dict[str, Any]:
    """On every rank: build this rank's part, run the recorded batch, compare every gradient.

    -> {"loss": on the last stage, "norms": {parameter: gradient norm}, "worst": largest relative difference
    and whose}.
    """
    _initialise(cut)
    chunks = _build(name, cut)
    for chunk in chunks:
        chunk.double()
        with torch.no_grad():
            for key, parameter in chunk.named_parameters():
                parameter.copy_(piece_of(weights, chunk, key, parameter))
    loss = _one_microbatch(name, cut, chunks)
    _join_gradients(cut, chunks)

    norms: dict[str, float] = {}
    worst = (0.0, "")
    for index, chunk in enumerate(chunks):
        prefix = f"{index}/" if len(chunks) > 1 else ""
        for key, parameter in chunk.named_parameters():
            own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            norms[prefix + key] = own.norm().item()
            if gradients is not None and not _unused(name, cut, key):
                expected = piece_of(gradients, chunk, key, parameter)
                error = ((own - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
                worst = max(worst, (error, prefix + key))
    if loss is not None and cut.cp > 1:
        loss = loss.detach()  # this rank's share of the mean
        dist.all_reduce(loss, group=parallel_state.get_context_parallel_group())
    return {"loss": None if loss is None else loss.item(), "norms": norms, "worst": worst}


def _initialise(cut: Cut) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=cut.tp,
        pipeline_model_parallel_size=cut.pp,
        virtual_pipeline_model_parallel_size=cut.vpp,
        context_parallel_size=cut.cp,
        expert_model_parallel_size=cut.ep,
        encoder_tensor_model_parallel_size=cut.tp if cut.encoder_pp else 0,
        encoder_pipeline_model_parallel_size=cut.encoder_pp,
        get_embedding_ranks=_t5_embedding_ranks if cut.encoder_pp else None,
        get_position_embedding_ranks=_t5_position_ranks if cut.encoder_pp else None,
    )
    model_parallel_cuda_manual_seed(1234)


def _t5_embedding_ranks(pp_ranks: list[int], split_rank: int | None = None) -> list[int]:
    return sorted(
        {pp_ranks[0], pp_ranks[parallel_state.get_pipeline_model_parallel_decoder_start() or 1], pp_ranks[-1]}
    )


def _t5_position_ranks(pp_ranks: list[int], split_rank: int | None = None) -> list[int]:
    return [pp_ranks[0], pp_ranks[parallel_state.get_pipeline_model_parallel_decoder_start() or 1]]


def _build(name: str, cut: Cut) -> list[torch.nn.Module]:
    config = recorded.config_of(
        name,
        tensor_model_parallel_size=cut.tp,
        pipeline_model_parallel_size=cut.pp,
        virtual_pipeline_model_parallel_size=cut.vpp,
        context_parallel_size=cut.cp,
        expert_model_parallel_size=cut.ep,
        sequence_parallel=cut.sequence_parallel,
        pipeline_dtype=torch.float64,
        **cut.changes,
    )
    if cut.encoder_pp:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        encoder_config = recorded.config_of(
            name,
            tensor_model_parallel_size=cut.tp,
            pipeline_model_parallel_size=cut.encoder_pp,
            pipeline_dtype=torch.float64,
        )
        last = cut.encoder_pp + cut.pp - 1
        model = recorded.build(
            name,
            config,
            encoder_config=encoder_config,
            pre_process=stage in (0, cut.encoder_pp),
            post_process=stage in (cut.encoder_pp - 1, last),
            add_encoder=stage < cut.encoder_pp,
            add_decoder=stage >= cut.encoder_pp,
        )
        return [model]
    chunks = []
    for chunk in range(cut.vpp or 1):
        if cut.vpp:
            parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
        place = {
            "pre_process": parallel_state.is_pipeline_first_stage(),
            "post_process": parallel_state.is_pipeline_last_stage(),
        }
        chunks.append(recorded.build(name, config, **place))
    return chunks


def piece_of(whole: dict[str, Tensor], chunk: torch.nn.Module, key: str, parameter: Tensor) -> Tensor:
    """This rank's piece of the whole model's tensor that belongs to a chunk's parameter."""
    tensor = whole[_global_name(chunk, key, whole)]
    if not getattr(parameter, "tensor_model_parallel", False):
        return tensor
    tp, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    dim = parameter.partition_dim
    stacked = re.fullmatch(r"(.*\.mixer)\.(in_proj|conv1d)\.(weight|bias)", key)
    if stacked:
        sizes = chunk.get_submodule(stacked[1]).sizes
        sections = sizes.in_proj if stacked[2] == "in_proj" else sizes.conv
        return cut_sections(tensor, list(sections.values()), rank, tp)
    if "linear_fc1" in key and tensor.size(0) > parameter.size(0) and chunk.config.gated_linear_unit:
        return torch.cat([half.chunk(tp, dim)[rank] for half in tensor.chunk(2, dim)], dim)
    return tensor.chunk(tp, dim)[rank]


def _global_name(chunk: torch.nn.Module, key: str, whole: dict[str, Tensor]) -> str:
    """Name in the whole model: layers count over all stages, the copy of a tied output weight is the
    embedding.
    """
    if key in ("output_layer.weight", "lm_head.output_layer.weight") and key not in whole:
        return "embedding.word_embeddings.weight"
    match = re.fullmatch(r"(\w+\.layers\.)(\d+)(\..*)", key)
    if match is None:
        return key
    layer = chunk.get_submodule(match[1] + match[2])
    assert isinstance(layer, (TransformerLayer, MambaLayer)), "only layers are numbered"
    rest = match[3]
    if ".local_experts." in rest:
        before, local, after = re.fullmatch(r"(.*\.local_experts\.)(\d+)(\..*)", rest).groups()  # type: ignore[union-attr]
        first = parallel_state.get_expert_model_parallel_rank() * layer.mlp.num_local_experts
        rest = f"{before}{first + int(local)}{after}"
    return f"{match[1]}{layer.layer_number - 1}{rest}"


def _unused(name: str, cut: Cut, key: str) -> bool:
    """T5's encoder stage holds a head it never uses."""
    in_encoder = cut.encoder_pp and parallel_state.get_pipeline_model_parallel_rank() < cut.encoder_pp
    return bool(in_encoder) and key.startswith(("lm_head", "output_layer"))


def _one_microbatch(name: str, cut: Cut, chunks: list[torch.nn.Module]) -> Tensor | None:
    """Forward through all stages (chunk by chunk), then backward; returns the last stage's loss."""
    batch = _double(recorded.arrays(name, "batch.npz"))
    if cut.cp > 1:
        batch = {key: _share_of_sequence(value, cut.cp) for key, value in batch.items()}
    ranks = parallel_state.get_current().ranks["pp"]
    stage, stages = ranks.index(dist.get_rank()), len(ranks)
    length = (batch["text_enc"] if name == "t5" else batch["tokens"]).size(1)
    hidden_shape = (length // (cut.tp if cut.sequence_parallel else 1), 2, chunks[0].config.hidden_size)
    inputs: list[Tensor | None] = []
    outputs: list[Tensor] = []
    loss = None
    for index, chunk in enumerate(chunks):
        received = None
        if stage > 0 or index > 0:
            received = torch.empty(hidden_shape, dtype=torch.float64)
            dist.recv(received, ranks[stage - 1])
            received.requires_grad_()
            chunk.set_input_tensor(received)
        inputs.append(received)
        is_end = stage == stages - 1 and index == len(chunks) - 1
        if is_end:
            loss = _loss(name, cut, chunk, batch)
            outputs.append(loss)
        else:
            outputs.append(_hidden(name, chunk, batch))
            dist.send(outputs[-1].detach().contiguous(), ranks[(stage + 1) % stages])
    for index in reversed(range(len(chunks))):
        is_end = stage == stages - 1 and index == len(chunks) - 1
        if is_end:
            outputs[index].backward()
        else:
            grad = torch.empty_like(outputs[index])
            dist.recv(grad, ranks[(stage + 1) % stages])
            outputs[index].backward(grad)
        source = inputs[index]
        if source is not None:
            dist.send(source.grad.contiguous(), ranks[stage - 1])
    return loss


def _share_of_sequence(t: Tensor, cp: int) -> Tensor:
    rank = parallel_state.get_context_parallel_rank()
    pieces = t.chunk(2 * cp, dim=1)
    return torch.cat((pieces[rank], pieces[2 * cp - 1 - rank]), dim=1)


def _positions(batch: dict[str, Tensor], cut: Cut) -> Tensor:
    positions = torch.arange(batch["tokens"].size(1) * cut.cp).expand(batch["tokens"].size(0), -1)
    return _share_of_sequence(positions, cut.cp) if cut.cp > 1 else positions


def _hidden(name: str, chunk: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A stage before the last: hidden states."""
    if name == "bert":
        return chunk(batch["tokens"], batch["padding_mask"], batch["types"])
    if name == "t5":
        masks = [batch[key] < 0.5 for key in ("enc_mask", "dec_mask", "enc_dec_mask")]
        return chunk(batch["text_enc"], batch["text_dec"], *masks)
    positions = torch.arange(batch["tokens"].size(1)).expand_as(batch["tokens"])
    return chunk(batch["tokens"], positions, None)


def _loss(name: str, cut: Cut, chunk: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if cut.cp == 1:
        return _losses_only(name, chunk, batch)
    per_token = chunk(batch["tokens"], _positions(batch, cut), None, labels=batch["labels"])
    count = batch["loss_mask"].sum()
    dist.all_reduce(count, group=parallel_state.get_context_parallel_group())
    return (per_token * batch["loss_mask"]).sum() / count


def _losses_only(name: str, chunk: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if name == "bert":
        per_token, binary = chunk(
            batch["tokens"], batch["padding_mask"], batch["types"], lm_labels=batch["labels"]
        )
        order = torch.nn.functional.cross_entropy(binary, batch["is_random"])
        return recorded.masked_mean(per_token, batch["loss_mask"]) + order
    if name == "t5":
        masks = [batch[key] < 0.5 for key in ("enc_mask", "dec_mask", "enc_dec_mask")]
        per_token = chunk(batch["text_enc"], batch["text_dec"], *masks, lm_labels=batch["labels"])
    else:
        positions = torch.arange(batch["tokens"].size(1)).expand_as(batch["tokens"])
        per_token = chunk(batch["tokens"], positions, None, labels=batch["labels"])
    return recorded.masked_mean(per_token, batch["loss_mask"])


def _join_gradients(cut: Cut, chunks: list[torch.nn.Module]) -> None:
    """What the runtime does after the last backward: sums over context, sequence and embedding groups."""
    groups = parallel_state.get_current()
    for chunk in chunks:
        for key, parameter in chunk.named_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if cut.cp > 1:
                dist.all_reduce(parameter.grad, group=groups.cp)
            if not getattr(parameter, "allreduce", True):
                parameter.grad /= cut.ep  # tokens of all replicas came here; the batch is the same in each
            head_norm = "q_layernorm" in key or "k_layernorm" in key
            if cut.tp > 1 and (
                (cut.sequence_parallel and getattr(parameter, "sequence_parallel", False)) or head_norm
            ):
                dist.all_reduce(parameter.grad, group=groups.tp)
    if groups.size("pp") > 1 and dist.get_rank() in groups.ranks["embd"]:
        first = parallel_state.get_pipeline_model_parallel_rank() == 0
        chunk = chunks[0] if first else chunks[-1]
        if chunk.share_embeddings_and_output_weights:
            dist.all_reduce(chunk.shared_embedding_or_output_weight().grad, group=groups.embd)
    positions = groups.ranks.get("pos_embd", [])
    if cut.join_positions and len(positions) > 1 and dist.get_rank() in positions:
        dist.all_reduce(chunks[0].embedding.position_embeddings.weight.grad, group=groups.pos_embd)


def documents(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mask [b, 1, s, s] and positions [b, s] of documents that end at fixed places, another one in each row."""
    length = ids.size(1)
    hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1).repeat(ids.size(0), 1, 1, 1)
    positions = torch.arange(length).repeat(ids.size(0), 1)
    for row in range(ids.size(0)):
        for stop in (3 + row, 10 - row):
            hidden[row, :, stop + 1 :, : stop + 1] = True
            positions[row, stop + 1 :] = torch.arange(length - stop - 1)
    return hidden, positions


def reference_with_documents(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """As `reference`, with the documents' mask and positions: parameters, gradients, summed loss."""
    model = recorded.build(name).double()
    model.load_state_dict(recorded.weights(name))
    batch = recorded.arrays(name, "batch.npz")
    hidden, positions = documents(batch["tokens"])
    loss = model(batch["tokens"], positions, hidden, labels=batch["labels"]).sum()
    loss.backward()
    named = dict(model.named_parameters())
    return {k: p.detach() for k, p in named.items()}, {k: p.grad for k, p in named.items()}, loss.item()


def run_documents(
    name: str, cut: Cut, weights: dict[str, Tensor], gradients: dict[str, Tensor]
) -> tuple[float, float]:
    """On every rank: this rank's part of the sequence and its rows of the mask -> (summed loss, worst gradient error)."""
    _initialise(cut)
    (model,) = _build(name, cut)
    model.double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(piece_of(weights, model, key, parameter))
    batch = recorded.arrays(name, "batch.npz")
    hidden, positions = documents(batch["tokens"])
    rows = _share_of_sequence(hidden.transpose(1, 2), cut.cp).transpose(1, 2)
    ids, labels, positions = (
        _share_of_sequence(t, cut.cp) for t in (batch["tokens"], batch["labels"], positions)
    )
    loss = model(ids, positions, rows, labels=labels).sum()
    loss.backward()
    _join_gradients(cut, [model])
    errors = [
        ((p.grad - (e := piece_of(gradients, model, key, p))).abs().max() / e.abs().max()).item()
        for key, p in model.named_parameters()
    ]
    total = loss.detach()
    dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return total.item(), max(errors)
