"""FLOPs of matrix products and bytes sent to other ranks in a training step, counted where torch dispatches them."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megatron.core import parallel_state
from megatron.training import training
from tests.runs.pretraining import run_script


class Sent(TorchDispatchMode):
    """Bytes that this rank sends: a ring passes on all parts of a tensor but one, once for a gather and for a reduction."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        groups = {
            "tensor": parallel_state.get_tensor_model_parallel_group(),
            "pipeline": parallel_state.get_pipeline_model_parallel_group(),
            "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        self._names = {group.group_name: name for name, group in groups.items()}
        if (tied := parallel_state.get_current().embd) is not None:
            self._names[tied.group_name] = "pipeline"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.partition("::")[2], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        group = next(dist.ProcessGroup.unbox(each) for each in args if isinstance(each, torch.ScriptObject))
        tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
        # Of the whole tensor and of one part of it the whole is the larger.
        size = max((t.numel() * t.element_size() for t in tensors), default=0)
        ring = (group.size() - 1) / group.size()
        share = {"send": 1.0, "allreduce_": 2 * ring, "_allgather_base_": ring, "_reduce_scatter_base_": ring}
        if name in share and group.size() > 1:
            self.bytes[self._names.get(group.group_name, "other")] += share[name] * size


def counted(argv: list[str], script: str) -> tuple[int, dict[str, float]]:
    """Body: run two steps; FLOPs of this rank's second one, and bytes sent by who they are sent to."""
    found: list[tuple[int, dict[str, float]]] = []
    original = training.train_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as flops, Sent() as sent:
            result = original(*args, **kwargs)
        found.append((flops.get_total_flops(), dict(sent.bytes)))
        return result

    with mock.patch.object(training, "train_step", watched):
        run_script(argv, script)
    return found[-1]
