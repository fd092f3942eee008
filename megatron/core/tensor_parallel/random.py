"""Random states by name, and recomputation that repeats the same draws.

Dropout on tensor-parallel activations must differ between ranks, on replicated ones it must agree. Each kind draws
from a generator state of its own; `get_cuda_rng_tracker().fork(name)` switches the device generator to it. On the
CPU the device generator is torch's default generator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.tensor_parallel.utils import gather_split_1d_tensor, split_tensor_into_1d_equal_chunks
from megatron.core.utils import is_te_min_version, safely_set_viewless_tensor_data

_MODEL_PARALLEL_RNG_TRACKER_NAME = "model-parallel-rng"
_EXPERT_PARALLEL_RNG_TRACKER_NAME = "expert-parallel-rng"
_DATA_PARALLEL_RNG_TRACKER_NAME = "data-parallel-rng"


def get_expert_parallel_rng_tracker_name() -> str:
    """The state from which expert weights are drawn."""
    return _EXPERT_PARALLEL_RNG_TRACKER_NAME


def get_data_parallel_rng_tracker_name() -> str:
    """The state that replicas of one stage share."""
    return _DATA_PARALLEL_RNG_TRACKER_NAME


class CudaRNGStatesTracker:
    """Generator states by name. The name of the class is v0.9's; it serves the CPU as well."""

    def __init__(self) -> None:
        self.reset()

    def is_initialized(self) -> bool:
        """True once a state was added or the table was set."""
        return self._is_initialized

    def reset(self) -> None:
        """Forget all states."""
        self._is_initialized = False
        self.states_: dict[str, Tensor] = {}
        self.seeds_: set[int] = set()

    def get_states(self) -> dict[str, Tensor]:
        """A copy of the table name -> state (the states themselves are never changed in place)."""
        return dict(self.states_)

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Replace the table."""
        self._is_initialized = True
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        """Seed a new state. ValueError if the seed or the name is taken: streams must be independent."""
        self._is_initialized = True
        if seed in self.seeds_:
            raise ValueError(f"rng tracker: seed {seed} already exists")
        if name in self.states_:
            raise ValueError(f"rng tracker: state {name} already exists")
        self.seeds_.add(seed)
        outside = device.get_rng_state()
        device.manual_seed(seed)
        self.states_[name] = device.get_rng_state()
        device.set_rng_state(outside)

    @contextlib.contextmanager
    def fork(self, name: str = _MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from the named state inside the block, which goes on from there next time."""
        if name not in self.states_:
            raise ValueError(
                f"rng tracker: state {name} is not added; call model_parallel_cuda_manual_seed(seed) first"
            )
        outside = device.get_rng_state()
        device.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = device.get_rng_state()
            device.set_rng_state(outside)


_TRACKER: Any = None


def initialize_rng_tracker(use_te_rng_tracker: bool = False) -> None:
    """Make the process-wide tracker unless there is one.

    use_te_rng_tracker: Transformer Engine's, whose states survive CUDA graphs; RuntimeError without TE >= 1.5.
    """
    global _TRACKER
    if _TRACKER is not None:
        return
    if use_te_rng_tracker:
        if not is_te_min_version("1.5.0"):
            raise RuntimeError(
                "use_te_rng_tracker needs transformer-engine >= 1.5; install it or drop the option"
            )
        from transformer_engine.pytorch.distributed import CudaRNGStatesTracker as TETracker  # optional

        _TRACKER = TETracker()
    else:
        _TRACKER = CudaRNGStatesTracker()


def destroy_rng_tracker() -> None:
    """Forget the process-wide tracker."""
    global _TRACKER
    _TRACKER = None


def get_cuda_rng_tracker(use_te_rng_tracker: bool = False) -> CudaRNGStatesTracker:
    """The process-wide tracker, made on first use."""
    initialize_rng_tracker(use_te_rng_tracker)
    return _TRACKER


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the device generator with `seed` and the tracker's three states.

    data-parallel: seed, alike on all tensor ranks. model-parallel: seed + 2718 + tp rank. expert-parallel: seed +
    1024 + 100 ep rank + tp rank. The caller adds 100 x pipeline rank to the seed beforehand.
    """
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    initialize_rng_tracker()
    _TRACKER.reset()
    device.manual_seed(seed)
    _TRACKER.add(_DATA_PARALLEL_RNG_TRACKER_NAME, seed)
    _TRACKER.add(_MODEL_PARALLEL_RNG_TRACKER_NAME, seed + 2718 + tp_rank)
    _TRACKER.add(_EXPERT_PARALLEL_RNG_TRACKER_NAME, seed + 1024 + 100 * ep_rank + tp_rank)


# Recomputation ----------------------------------------------------------------------------------------------------


class _RandomStates:
    """All states a forward pass may draw from: host generator, device generator, tracker."""

    def __init__(self) -> None:
        self.host = torch.get_rng_state()
        self.device = device.get_rng_state() if device.available() else None
        self.tracker = get_cuda_rng_tracker().get_states()

    def restore(self) -> None:
        """Make them current."""
        torch.set_rng_state(self.host)
        if self.device is not None:
            device.set_rng_state(self.device)
        get_cuda_rng_tracker().set_states(self.tracker)


class CheckpointFunction(torch.autograd.Function):
    """Run a function without keeping its graph; run it again, with the same draws, when gradients are needed."""

    @staticmethod
    def forward(
        ctx: Any, run_function: Callable[..., Any], distribute_saved_activations: bool, *args: Any
    ) -> Any:
        """args: tensors and other values, passed on; distribute_saved_activations: see `checkpoint`."""
        ctx.run_function = run_function
        ctx.states = _RandomStates()
        with torch.no_grad():
            outputs = run_function(*args)

        ctx.whole_shape = None
        if distribute_saved_activations:
            ctx.whole_shape = args[0].shape
            share = split_tensor_into_1d_equal_chunks(args[0].data, new_buffer=True)
            safely_set_viewless_tensor_data(args[0], share)
        ctx.is_tensor = [isinstance(arg, Tensor) for arg in args]
        ctx.others = [arg for arg in args if not isinstance(arg, Tensor)]
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
        return outputs

    @staticmethod
    def backward(ctx: Any, *args: Tensor | None) -> tuple[Any, ...]:
        """Recompute, then differentiate. RuntimeError under torch.autograd.grad, which wants no leaf gradients."""
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("recomputation works with .backward() only, not with torch.autograd.grad")
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        inputs = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
        if ctx.whole_shape is not None:
            whole = gather_split_1d_tensor(inputs[0].data).view(ctx.whole_shape)
            safely_set_viewless_tensor_data(inputs[0], whole)

        now = _RandomStates()
        ctx.states.restore()
        copies = [
            value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
            for value in inputs
        ]
        with torch.enable_grad():
            outputs = ctx.run_function(*copies)
        now.restore()

        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, args)
            if isinstance(output, Tensor) and output.requires_grad
        ]
        torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
        return (None, None, *(copy.grad if isinstance(copy, Tensor) else None for copy in copies))


def checkpoint(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
    """`function(*args)` whose activations are recomputed in the backward pass instead of kept.

    distribute_saved_activations: keep of the first argument, a tensor, only this tensor-parallel rank's flat share; it
    takes the place of the argument's own data, which the caller must not read afterwards.
    """
    return CheckpointFunction.apply(function, distribute_saved_activations, *args)
