"""A step's memory per rank, counted from live tensors, is what the explanation of its command line says (within 10%)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron.training import training
from megatron.training.explain import explain
from tests.gang.harness import run_gang
from tests.runs.pretraining import run_script

#: Saved parameters come back from hooks as aliases without main_grad, so gradients must not be accumulated inside GEMMs.
COMMON = (
    "--no-gradient-accumulation-fusion "
    "--hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 --micro-batch-size 2 "
    "--global-batch-size 16 --train-iters 2 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 500 "
    "--make-vocab-size-divisible-by 128 --eval-iters 0 --num-workers 0 --distributed-backend gloo --transformer-impl local "
)
GPT = "--num-layers 4 "
LLAMA = (
    "--num-layers 4 --swiglu --normalization RMSNorm --disable-bias-linear --group-query-attention --num-query-groups 2 "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
)

CASES = {
    "one rank": (1, GPT),
    "bf16": (1, GPT + "--bf16"),
    "llama bf16": (1, LLAMA + "--bf16"),
    "no dropout": (1, GPT + "--attention-dropout 0 --hidden-dropout 0"),
    "scores in fp32": (1, GPT + "--fp16 --initial-loss-scale 256 --apply-query-key-layer-scaling"),
    "selective": (1, GPT + "--recompute-granularity selective"),
    "full uniform": (
        1,
        GPT + "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
    ),
    "full block": (1, GPT + "--recompute-granularity full --recompute-method block --recompute-num-layers 2"),
    "tp2": (2, GPT + "--tensor-model-parallel-size 2"),
    "tp2+sp llama": (2, LLAMA + "--tensor-model-parallel-size 2 --sequence-parallel --bf16"),
    "cp2 llama": (2, LLAMA + "--context-parallel-size 2"),
    "dp2 distopt": (2, GPT + "--use-distributed-optimizer --bf16"),
    "dp2 distopt fp16": (2, GPT + "--use-distributed-optimizer --fp16 --initial-loss-scale 256"),
    "moe": (1, GPT + "--num-experts 4 --moe-router-topk 2 --disable-bias-linear"),
    "pp2": (2, GPT + "--pipeline-model-parallel-size 2"),
    "pp4": (4, GPT + "--pipeline-model-parallel-size 4 --bf16"),
    "pp2 x vpp2": (2, GPT + "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "tp2 x pp2 + distopt": (
        4,
        LLAMA + "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
        "--use-distributed-optimizer --bf16",
    ),
}


class SavedBytes:
    """Bytes of the distinct storages that autograd holds beside the parameters, now and at most."""

    def __init__(self, params: list[Tensor]) -> None:
        self._ignored = set(_storages(params))
        self.now = self.peak = 0
        self._users: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Any:
        """Count a saved tensor until the graph lets it go."""
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._ignored or not size:
            return tensor
        self._users[place] = self._users.get(place, 0) + 1
        if self._users[place] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        held = _Held(tensor)
        weakref.finalize(held, self._release, place, size)
        return held

    def _release(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self.now -= size


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _unpack(held: Any) -> Tensor:
    return held.tensor if isinstance(held, _Held) else held


def measured(argv: list[str]) -> dict[str, int]:
    """Body: run two steps; bytes of this rank's weights, gradients and optimizer state, and of activations at their peak."""
    found: dict[str, int] = {}
    original = training.train_step

    def watched(forward: Any, iterator: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        params = [param for chunk in model for param in chunk.parameters()]
        weights = _storages(params)
        buffers = [b for chunk in model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        gradients = _storages(buffer.grad_data for buffer in buffers)
        saved = SavedBytes(params)
        state: dict[int, int] = {}

        def look(inner: Any, *_: Any) -> None:
            # Right after an update, before copies of gradients are let go.
            state.update(_storages(_tensors_of(inner)))

        watches = [each.optimizer.register_step_post_hook(look) for each in _parts(optimizer)]
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, _unpack):
            result = original(forward, iterator, model, optimizer, *args, **kwargs)
        for watch in watches:
            watch.remove()
        others = {
            place: size for place, size in state.items() if place not in weights and place not in gradients
        }
        found.update(
            weights=sum(weights.values()),
            gradients=sum(gradients.values()),
            optimizer=sum(others.values()),
            activations=saved.peak,
        )
        return result

    with mock.patch.object(training, "train_step", watched):
        run_script(argv)
    return found


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by the storage's address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _tensors_of(inner: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The parameters that an inner optimizer updates, their gradients, and its state."""
    for group in inner.param_groups:
        for param in group["params"]:
            yield param.data
            if param.grad is not None:
                yield param.grad
    for state in inner.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


@pytest.mark.parametrize("name", CASES)
def test_memory_is_as_predicted(name: str) -> None:
    ranks, flags = CASES[name]
    argv = (COMMON + flags).split()
    plan = explain([*argv, "--world-size", str(ranks), "--device", "cpu"])
    counted = run_gang(ranks, measured, argv)
    per_stage = ranks // len(plan.memory)
    for rank, found in enumerate(counted):
        said = plan.memory[rank // per_stage]
        wanted = {part: getattr(said, part) for part in found}
        for part, size in found.items():
            assert wanted[part] == pytest.approx(size, rel=0.1), (
                f"rank {rank} {part}: {found} and not {wanted}"
            )
