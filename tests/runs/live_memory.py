"""Bytes of live tensors while a training script runs: parameters, gradients, optimizer state, and what autograd holds."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import checkpoint

from megatron.training import training
from tests.runs.pretraining import run_script

#: Saved parameters come back from hooks as aliases without main_grad, so gradients must not be accumulated inside GEMMs.
COUNTABLE = "--no-gradient-accumulation-fusion "


class SavedBytes:
    """Bytes of the distinct storages that autograd holds beside the parameters, now and at most."""

    def __init__(self, params: list[Tensor]) -> None:
        self._ignored = set(_storages(params))
        self.now = self.peak = 0
        self._users: dict[int, int] = {}

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved inside the block, and what checkpointed functions save when they run again."""
        count = self._count

        class Counted(checkpoint._recomputation_hook):
            """Torch holds what a checkpointed function saves again until the graph has asked for it."""

            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                keep = self.pack_hook

                def pack(tensor: Tensor) -> Tensor:
                    held = tensor.detach()
                    count(held, held)
                    return keep(held)

                self.pack_hook = pack

        with (
            torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack),
            mock.patch.object(checkpoint, "_recomputation_hook", Counted),
        ):
            yield

    def _pack(self, tensor: Tensor) -> Any:
        held = _Held(tensor)
        return held if self._count(tensor, held) else tensor

    def _count(self, tensor: Tensor, holder: object) -> bool:
        """Count a tensor until its holder is gone; False for what is not counted."""
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._ignored or not size:
            return False
        self._users[place] = self._users.get(place, 0) + 1
        if self._users[place] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(holder, self._release, place, size)
        return True

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


def measured(argv: list[str], script: str = "pretrain_gpt") -> dict[str, int]:
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
        with saved.counting():
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
        run_script(argv, script)
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
