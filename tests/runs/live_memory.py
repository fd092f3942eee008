"""Bytes of live tensors while a training script runs: parameters, gradients, optimizer state, and what autograd holds."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

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
