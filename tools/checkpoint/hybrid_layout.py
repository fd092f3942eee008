"""Hybrid models' torch-format checkpoints: joined to whole tensors and cut for another layout, stage by stage."""

from __future__ import annotations

import argparse
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing import check_is_distributed_checkpoint, durable
from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.errors import CheckpointError, FlagError, InvariantError, MegatronError
from megatron.core.ssm.sections import MixerSizes, cut_sections, join_sections, mixer_sizes
from megatron.training.checkpointing.layout import MODEL_FILE, Tracked, read_tracker, write_tracker
from tools.checkpoint.saver_mcore import Sizes, target_arguments

_EXPAND = 2
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_EXTRA_STATE = re.compile(r"_extra_state\d*$")
#: Patterns of names (of a layer without its number) and the dimension that is cut; None is whole on every rank.
_CUT = [
    (r"mixer\.(A_log|D|dt_bias|norm\.weight)", 0),
    (r"mixer\.out_proj\.weight", 1),
    (r"self_attention\.linear_qkv\.(weight|bias)", 0),
    (r"self_attention\.linear_proj\.weight", 1),
    (r"mlp\.linear_fc1\.(weight|bias)", 0),
    (r"mlp\.linear_fc2\.weight", 1),
    (r"(mixer\.out_proj|self_attention\.linear_proj|mlp\.linear_fc2)\.bias", None),
    (r"(.*\.)?(layer_norm_|norm\.|input_layernorm\.|pre_mlp_layernorm\.|final_norm\.)(weight|bias)", None),
    (r"embedding\.word_embeddings\.weight|output_layer\.weight", 0),
    (r"embedding\.position_embeddings\.weight", None),
]
#: Matrices that are stacked in one parameter, each cut on its own.
_STACKED = re.compile(r"(mixer\.in_proj|mixer\.conv1d|mlp\.linear_fc1)\.(weight|bias)")


def parser() -> argparse.ArgumentParser:
    """The command line, as in v0.9."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--load-dir", type=str, help="directory with the tracker file of the checkpoint to read"
    )
    parser.add_argument("--save-dir", type=str, help="directory to write")
    parser.add_argument("--target-tp-size", type=int, default=1, help="tensor-parallel size of the result")
    parser.add_argument("--target-pp-size", type=int, default=1, help="pipeline-parallel size of the result")
    parser.add_argument(
        "--reset-iterations",
        action="store_true",
        help="count from zero: written as a release, without a schedule",
    )
    parser.add_argument("--d-model", type=int, default=4096, help="width of the residual stream")
    parser.add_argument("--mamba-version", type=int, default=2, help="2; Mamba-1 is not supported")
    parser.add_argument("--mamba-d-state", type=int, default=128, help="numbers of state per channel")
    parser.add_argument("--mamba2-n-groups", type=int, default=8, help="groups of heads that share B and C")
    parser.add_argument("--mamba2-head-dim", type=int, default=64, help="channels of a head")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 0 only if the whole checkpoint was written."""
    try:
        convert(parser().parse_args(argv))
    except MegatronError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def convert(args: Namespace) -> Path:
    """Write the checkpoint that `args` ask for; returns its directory, which appears only when it is complete."""
    for flag, value in (("--load-dir", args.load_dir), ("--save-dir", args.save_dir)):
        if not value:
            raise FlagError(flag, "it is not said which directory", f"give {flag} DIR")
    if Path(args.load_dir).resolve() == Path(args.save_dir).resolve():
        raise FlagError("--save-dir", "it is the directory that is read", "name another one")
    for flag, size in (("--target-tp-size", args.target_tp_size), ("--target-pp-size", args.target_pp_size)):
        if size < 1:
            raise FlagError(flag, f"a model is not divided over {size} ranks", "give 1 or more")
    if args.mamba_version != 2:
        raise FlagError("--mamba-version", "only Mamba-2 is supported", "leave it at 2")
    try:
        sizes = mixer_sizes(
            args.d_model, args.mamba_d_state, _EXPAND, args.mamba2_head_dim, args.mamba2_n_groups
        )
    except InvariantError as error:
        flags = "--d-model, --mamba2-head-dim, --mamba2-n-groups"
        raise FlagError(flags, error.why, "give the checkpoint's own sizes") from error
    for what, count in (("heads", sizes.nheads), ("groups", sizes.ngroups)):
        if count % args.target_tp_size:
            why = f"{args.target_tp_size} does not divide the {count} {what} of a Mamba layer"
            raise FlagError("--target-tp-size", why, "choose a size that divides heads and groups")
    source = _Source(Path(args.load_dir), sizes)
    if source.layers % args.target_pp_size:
        raise FlagError(
            "--target-pp-size",
            f"{args.target_pp_size} does not divide the {source.layers} layers",
            "choose a size that divides them",
        )

    iteration = 0 if args.reset_iterations else source.iteration
    tracked = Tracked(iteration) if iteration else Tracked(0, release=True)
    final = Path(args.save_dir) / tracked.directory
    staged = durable.stage(final)
    content = source.beside_the_model(args, iteration)
    checksums = {}
    for stage in range(args.target_pp_size):
        for rank, weights in enumerate(_stage(source, stage, args.target_tp_size, args.target_pp_size)):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if args.target_pp_size > 1 else "")
            (staged / name).mkdir()
            file = staged / name / MODEL_FILE
            with durable.naming_path(file, "writing"):
                checksums[f"{name}/{MODEL_FILE}"] = durable.save_file({**content, "model": weights}, file)
    durable.write_manifest(staged, checksums)
    durable.publish(final)
    write_tracker(args.save_dir, tracked)
    print(f"saved {final} (tensor parallel {args.target_tp_size}, pipeline parallel {args.target_pp_size})")
    return final


@dataclass(frozen=True)
class _Cut:
    """How a tensor is divided: along `dim` (None: not), each of its stacked `sections` of rows on its own."""

    dim: int | None
    sections: tuple[int, ...] = ()

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The whole tensor from those of all ranks."""
        if self.dim is None:
            return pieces[0]
        if self.sections:
            return join_sections(pieces, [rows // len(pieces) for rows in self.sections])
        return torch.cat(pieces, self.dim)

    def divide(self, whole: Tensor, ranks: int) -> list[Tensor]:
        """What each rank holds, in memory of its own."""
        if self.dim is None:
            return [whole] * ranks
        if self.sections:
            return [cut_sections(whole, self.sections, rank, ranks) for rank in range(ranks)]
        return [piece.clone() for piece in whole.chunk(ranks, self.dim)]

    def divides(self, whole: Tensor, ranks: int) -> bool:
        """Whether all ranks get equal parts."""
        lengths = self.sections or (() if self.dim is None else (whole.size(self.dim),))
        return all(length % ranks == 0 for length in lengths)


class _Source:
    """The rank files of a hybrid model's checkpoint, memory-mapped. CheckpointError if it is another kind of checkpoint."""

    def __init__(self, directory: Path, sizes: MixerSizes) -> None:
        self.path = directory / read_tracker(str(directory)).directory
        self._sizes = sizes
        if check_is_distributed_checkpoint(self.path):
            raise self._refusal("it is a distributed checkpoint", "load it as it is: every layout can")
        durable.verify(self.path)
        files = {file.parent.name: file for file in sorted(self.path.glob(f"mp_rank_*/{MODEL_FILE}"))}
        if not files:
            raise self._refusal(f"it has no mp_rank_*/{MODEL_FILE}", "name the directory a run saved into")
        states = {name: load_file(file) for name, file in files.items()}
        self._sample = next(iter(states.values()))
        if not isinstance(self._sample, dict) or not {"args", "model"} <= self._sample.keys():
            raise self._refusal(
                "its files hold no arguments and one model", "use a checkpoint of pretrain_mamba.py"
            )
        self.args: Namespace = self._sample["args"]
        self.iteration: int = self._sample.get("iteration", 0)
        tp, pp = self.args.tensor_model_parallel_size, self.args.pipeline_model_parallel_size
        names = [
            [f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "") for rank in range(tp)]
            for stage in range(pp)
        ]
        if {name for stage in names for name in stage} != set(files):
            why = f"its arguments say tensor parallel {tp} and pipeline parallel {pp}, its files are {' '.join(files)}"
            raise self._refusal(why, "restore the missing files")
        self._stages: list[list[dict[str, Any]]] = [
            [states[name]["model"] for name in stage] for stage in names
        ]
        # (stage, number within it) of each layer of the model.
        self._layers = [
            (stage, local)
            for stage, ranks in enumerate(self._stages)
            for local in range(_layers_of(ranks[0]))
        ]
        self.layers = len(self._layers)
        self._check()

    def _refusal(self, why: str, fix: str) -> CheckpointError:
        return CheckpointError(str(self.path), why, fix)

    def _check(self) -> None:
        """What is converted must be a hybrid model of the sizes that were given."""
        names = {name for ranks in self._stages for name in ranks[0]}
        if any(".mixer.x_proj." in name for name in names):
            raise self._refusal(
                "its layers are Mamba-1's, whose projections differ", "only Mamba-2 is supported"
            )
        projections = [name for name in self._stages[0][0] if name.endswith(".mixer.in_proj.weight")]
        if not any(name.endswith(".mixer.in_proj.weight") for name in names):
            raise self._refusal(
                "it has no Mamba layers", "convert other models with tools/checkpoint/convert.py"
            )
        for name in projections:
            ranks, (rows, width) = len(self._stages[0]), self._stages[0][0][name].shape
            wanted = sum(self._sizes.in_proj.values())
            if rows * ranks != wanted or width * _EXPAND != self._sizes.d_inner:
                raise self._refusal(
                    f"{name} is a matrix of {rows * ranks} x {width}, the sizes that were given make one of "
                    f"{wanted} x {self._sizes.d_inner // _EXPAND}",
                    "give its own sizes as --d-model, --mamba-d-state, --mamba2-n-groups and --mamba2-head-dim",
                )

    def beside_the_model(self, args: Namespace, iteration: int) -> dict[str, Any]:
        """What every file of the result holds beside the weights; there is no optimizer."""
        saved = target_arguments(
            Namespace(checkpoint_args=self.args), args, Sizes(args.target_tp_size, args.target_pp_size, 1)
        )
        content = {"args": saved, "checkpoint_version": self._sample.get("checkpoint_version", 3.0)}
        kept = ["rng_state", "num_floating_point_operations_so_far"]
        if args.reset_iterations:
            counters = "iteration consumed_train_samples consumed_valid_samples train_iters train_samples"
            vars(saved).update(dict.fromkeys(counters.split(), 0))
        else:
            kept.append("opt_param_scheduler")
        content |= {name: self._sample[name] for name in kept if name in self._sample}
        return {**content, "iteration": iteration}

    def layer(self, index: int) -> Iterator[tuple[str, list[Any]]]:
        """(name within the layer, every tensor-parallel rank's value) of a layer of the model."""
        stage, local = self._layers[index]
        prefix = f"decoder.layers.{local}."
        for name in self._stages[stage][0]:
            if name.startswith(prefix):
                yield name[len(prefix) :], [weights[name] for weights in self._stages[stage]]

    def before_the_layers(self) -> Iterator[tuple[str, list[Any]]]:
        """The same of the embedding, under its own name."""
        return self._outside(0, "embedding.")

    def behind_the_layers(self, one_stage: bool) -> Iterator[tuple[str, list[Any]]]:
        """The same of the last norm and the output layer; `one_stage`: the embedding is in the same file."""
        yield from self._outside(-1, "decoder.final_norm.")
        if getattr(self.args, "untie_embeddings_and_output_weights", False):
            yield from self._outside(-1, "output_layer.")
        elif not one_stage:
            # The last stage computes logits with its own copy of the tied embedding.
            for _, pieces in self._outside(0, "embedding.word_embeddings."):
                yield "output_layer.weight", pieces

    def _outside(self, stage: int, prefix: str) -> Iterator[tuple[str, list[Any]]]:
        for name in self._stages[stage][0]:
            if name.startswith(prefix):
                yield name, [weights[name] for weights in self._stages[stage]]

    def cut_of(self, name: str) -> _Cut:
        """How a tensor is divided, by its name without a layer's number. CheckpointError for one that is not known."""
        stacked = _STACKED.fullmatch(name)
        if stacked and stacked[1] == "mixer.in_proj":
            return _Cut(0, tuple(self._sizes.in_proj.values()))
        if stacked and stacked[1] == "mixer.conv1d":
            return _Cut(0, tuple(self._sizes.conv.values()))
        if stacked and getattr(self.args, "swiglu", False):
            return _Cut(0, (self.args.ffn_hidden_size,) * 2)
        for pattern, dim in _CUT:
            if re.fullmatch(pattern, name):
                return _Cut(dim)
        raise self._refusal(f"{name} is no tensor of a hybrid model", "use a checkpoint of pretrain_mamba.py")


def _layers_of(weights: dict[str, Any]) -> int:
    return len({match[1] for match in map(_LAYER.match, weights) if match})


def _stage(source: _Source, stage: int, tp: int, pp: int) -> list[dict[str, Any]]:
    """The weights of each tensor-parallel rank of a stage of the result."""
    ranks: list[dict[str, Any]] = [{} for _ in range(tp)]
    count = source.layers // pp
    named = [(f"decoder.layers.{local}.", source.layer(stage * count + local)) for local in range(count)]
    if stage == 0:
        named.insert(0, ("", source.before_the_layers()))
    if stage == pp - 1:
        named.append(("", source.behind_the_layers(one_stage=pp == 1)))
    for prefix, tensors in named:
        for name, pieces in tensors:
            for weights, piece in zip(ranks, _cut_anew(source, name, pieces, tp)):
                weights[prefix + name] = piece
    return ranks


def _cut_anew(source: _Source, name: str, pieces: list[Any], tp: int) -> list[Any]:
    """One tensor for each of `tp` ranks."""
    if _EXTRA_STATE.search(name):
        return pieces[:1] * tp
    cut = source.cut_of(name)
    whole = cut.join(pieces)
    if not cut.divides(whole, tp):
        raise FlagError(
            "--target-tp-size",
            f"{tp} does not divide {name} of {tuple(whole.shape)}",
            "choose a size that does",
        )
    return cut.divide(whole, tp)
