"""Names and places: which file of a checkpoint directory belongs to which iteration and rank."""

from __future__ import annotations

import enum
import itertools
import os
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import check_is_distributed_checkpoint, durable
from megatron.core.errors import CheckpointError

MODEL_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
_ITERATION_DIRECTORY = re.compile(r"iter_(\d{7,})")


class CheckpointType(enum.Enum):
    """LEGACY: one file per model-parallel rank; LOCAL: node-local; GLOBAL: distributed."""

    LEGACY = enum.auto()
    LOCAL = enum.auto()
    GLOBAL = enum.auto()


@dataclass(frozen=True)
class Tracked:
    """What the tracker file of a directory names: an iteration, or a release without one."""

    iteration: int
    release: bool = False

    @property
    def directory(self) -> str:
        """Name of the checkpoint's directory."""
        return "release" if self.release else f"iter_{self.iteration:07d}"

    def __str__(self) -> str:
        return "release" if self.release else f"iteration {self.iteration}"


def ensure_directory_exists(filename: str, check_parent: bool = True) -> None:
    """Make the directory `filename`, or with `check_parent` the directory that holds it."""
    os.makedirs(os.path.dirname(filename) if check_parent else filename, exist_ok=True)


def get_checkpoint_name(
    checkpoints_path: str,
    iteration: int,
    release: bool = False,
    pipeline_parallel: bool | None = None,
    tensor_rank: int | None = None,
    pipeline_rank: int | None = None,
    expert_parallel: bool | None = None,
    expert_rank: int | None = None,
    return_base_dir: bool = False,
    basename: str = MODEL_FILE,
) -> str:
    """Path of a rank's file; the rank and the axes in use default to those of this process.

    The directory is `mp_rank_TT`, followed by `_PPP` if there is pipeline and `_EEE` if there is expert
    parallelism. With `return_base_dir` only the directory of the iteration is returned.
    """
    base = os.path.join(checkpoints_path, Tracked(iteration, release).directory)
    if return_base_dir:
        return base
    if pipeline_parallel is None:
        pipeline_parallel = mpu.get_pipeline_model_parallel_world_size() > 1
    if expert_parallel is None:
        expert_parallel = mpu.get_expert_model_parallel_world_size() > 1
    if tensor_rank is None:
        tensor_rank = mpu.get_tensor_model_parallel_rank()
    name = f"mp_rank_{tensor_rank:02d}"
    if pipeline_parallel:
        name += f"_{mpu.get_pipeline_model_parallel_rank() if pipeline_rank is None else pipeline_rank:03d}"
    if expert_parallel:
        name += f"_{mpu.get_expert_model_parallel_rank() if expert_rank is None else expert_rank:03d}"
    return os.path.join(base, name, basename)


def get_distributed_optimizer_checkpoint_name(model_checkpoint_name: str) -> str:
    """Path of the distributed optimizer's file beside the model file."""
    return os.path.join(os.path.dirname(model_checkpoint_name), OPTIMIZER_FILE)


def find_checkpoint_rank_0(checkpoints_path: str, iteration: int, release: bool = False) -> str | None:
    """The first rank's file of a torch-format checkpoint or the directory of a distributed one; None if neither.

    Whether the run that wrote it used pipeline or expert parallelism is unknown, so all spellings are tried.
    """
    for pipeline_parallel, expert_parallel in itertools.product((False, True), repeat=2):
        path = get_checkpoint_name(
            checkpoints_path,
            iteration,
            release,
            pipeline_parallel=pipeline_parallel,
            tensor_rank=0,
            pipeline_rank=0,
            expert_parallel=expert_parallel,
            expert_rank=0,
        )
        if os.path.isfile(path):
            return path
    base = get_checkpoint_name(checkpoints_path, iteration, release, return_base_dir=True)
    return base if check_is_distributed_checkpoint(base) else None


def get_checkpoint_tracker_filename(checkpoints_path: str) -> str:
    """Path of the file that names the newest complete checkpoint."""
    return os.path.join(checkpoints_path, TRACKER_FILE)


def checkpoint_exists(checkpoints_path: str | None) -> bool:
    """Whether the directory has a tracker file."""
    return checkpoints_path is not None and os.path.isfile(get_checkpoint_tracker_filename(checkpoints_path))


def read_tracker(checkpoints_path: str) -> Tracked:
    """What the tracker names. CheckpointError if it is neither a positive iteration nor `release`."""
    path = get_checkpoint_tracker_filename(checkpoints_path)
    with durable.naming_path(path, "reading"), open(path, errors="replace") as file:
        content = file.read().strip()
    if content == "release":
        return Tracked(0, release=True)
    if not (content.isascii() and content.isdigit()) or int(content) == 0:
        why = f"it must hold an iteration or the word release, not {content[:40]!r}"
        raise CheckpointError(path, why, "write the iteration of a complete iter_* directory into it")
    return Tracked(int(content))


def read_metadata(tracker_filename: str) -> tuple[int, bool]:
    """(iteration, whether it is a release) that the tracker file names."""
    tracked = read_tracker(os.path.dirname(tracker_filename))
    return tracked.iteration, tracked.release


def write_tracker(checkpoints_path: str, tracked: Tracked) -> None:
    """Point the tracker at a checkpoint, in one step."""
    content = "release" if tracked.release else str(tracked.iteration)
    durable.write_text(get_checkpoint_tracker_filename(checkpoints_path), content)


def saved_iterations(checkpoints_path: str) -> list[int]:
    """Iterations that have a directory, newest first."""
    if not os.path.isdir(checkpoints_path):
        return []
    found = (_ITERATION_DIRECTORY.fullmatch(name) for name in os.listdir(checkpoints_path))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def prune(checkpoints_path: str, keep: int, newest: int) -> list[int]:
    """Delete all but the `keep` newest iterations up to `newest`; returns those deleted."""
    doomed = [i for i in saved_iterations(checkpoints_path) if i <= newest][keep:]
    for iteration in doomed:
        durable.remove_directory(Path(checkpoints_path) / Tracked(iteration).directory)
    return doomed


def non_persistent_directory(args: Namespace, root: str | None) -> str | None:
    """Where non-persistent checkpoints are: the given directory or `non_persistent` below `root`."""
    if args.non_persistent_global_ckpt_dir is not None:
        return args.non_persistent_global_ckpt_dir
    return None if root is None else os.path.join(root, "non_persistent")
