"""The device: which one, its backend name, random state, memory and synchronisation; plain no-ops on the CPU.

This is the only file of the library's lower layers that spells the accelerator's name. Everything above asks
these functions and therefore runs unchanged on a laptop.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

#: What each requested backend becomes where no accelerator exists.
_CPU_BACKENDS = {"nccl": "gloo", "ucc": "gloo"}


#: Kinds of device that are planned for rather than used; the innermost `planning` block counts.
_planned: list[str] = []


@contextmanager
def planning(planned_kind: str) -> Iterator[None]:
    """Let `kind()` be `planned_kind` and `current()` the meta device, which holds no data, inside the block.

    For plans of models and machines that do not fit here.
    """
    _planned.append(planned_kind)
    try:
        yield
    finally:
        _planned.pop()


def available() -> bool:
    """True when an accelerator can be used by this process."""
    return torch.cuda.is_available()


def kind() -> str:
    """`"cuda"` when an accelerator is present, else `"cpu"`."""
    if _planned:
        return _planned[-1]
    return "cuda" if available() else "cpu"


def init(local_rank: int) -> torch.device:
    """Bind this process to its device: accelerator `local_rank` (modulo those present), or the CPU."""
    if not available():
        keep_freed_memory()
        return torch.device("cpu")
    configure_allocator()
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return current()


def configure_allocator() -> None:
    """Let the accelerator's allocator grow its segments, so that layouts of changing sizes do not fragment memory.

    What the user says in PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF) stands.
    """
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ):
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of returning them to the system; a no-op elsewhere.

    By default every tensor above 32 MB is mapped, zeroed page by page and unmapped again at each use, which costs
    more than the arithmetic on it: the loss of 1024 tokens x 8192 words takes 48 ms instead of 19.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def current() -> torch.device:
    """The device on which this process computes."""
    if _planned:
        return torch.device("meta")
    return torch.device("cuda", torch.cuda.current_device()) if available() else torch.device("cpu")


def backend_for(requested: str) -> tuple[str, str | None]:
    """The process-group backend to start and, if it is not the requested one, a notice saying why."""
    if available() or requested not in _CPU_BACKENDS:
        return requested, None
    backend = _CPU_BACKENDS[requested]
    return backend, f"--distributed-backend {requested} needs an accelerator; using {backend} on the CPU"


def synchronize() -> None:
    """Wait until all work queued on the device is done."""
    if available():
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Return cached, unused device memory to the driver."""
    if available():
        torch.cuda.empty_cache()


def manual_seed(seed: int) -> None:
    """Seed the device generator. On the CPU that is torch's default generator itself."""
    if available():
        torch.cuda.manual_seed(seed)
    else:
        torch.random.default_generator.manual_seed(seed)


def get_rng_state() -> torch.Tensor:
    """A copy of the device generator's state, uint8 [bytes] in host memory."""
    return torch.cuda.get_rng_state() if available() else torch.random.default_generator.get_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Restore a state made by `get_rng_state` on the same kind of device."""
    if available():
        torch.cuda.set_rng_state(state)
    else:
        torch.random.default_generator.set_state(state)


def memory_stats() -> dict[str, int]:
    """Allocated, peak and reserved bytes of the device and its live allocations; zeros on the CPU, which torch
    does not count.
    """
    names = (
        "allocated_bytes",
        "max_allocated_bytes",
        "reserved_bytes",
        "max_reserved_bytes",
        "allocated_count",
    )
    if not available():
        return dict.fromkeys(names, 0)
    values = (
        torch.cuda.memory_allocated(),
        torch.cuda.max_memory_allocated(),
        torch.cuda.memory_reserved(),
        torch.cuda.max_memory_reserved(),
        torch.cuda.memory_stats().get("allocation.all.current", 0),
    )
    return dict(zip(names, values))


def capability() -> tuple[int, int] | None:
    """The accelerator's compute capability, or None on the CPU."""
    return torch.cuda.get_device_capability() if available() else None


def device_name() -> str:
    """The accelerator's product name, or `"cpu"`."""
    return torch.cuda.get_device_name() if available() else "cpu"


def sensors() -> tuple[int, int, int, int]:
    """Temperature in C, power in mW, utilisation in % and clock in MHz of the accelerator; zeros where none can be read.

    torch reads them through the package pynvml.
    """
    if not available():
        return 0, 0, 0, 0
    try:
        return (
            torch.cuda.temperature(),
            torch.cuda.power_draw(),
            torch.cuda.utilization(),
            torch.cuda.clock_rate(),
        )
    except (ModuleNotFoundError, RuntimeError):
        return 0, 0, 0, 0


def is_half(dtype: torch.dtype) -> bool:
    """True for the two 16-bit floating types."""
    return dtype in (torch.float16, torch.bfloat16)


def start_external_profiler() -> None:
    """Open the capture range of an attached profiler (nsys) and annotate operators for it."""
    if available():
        torch.cuda.cudart().cudaProfilerStart()
        torch.autograd.profiler.emit_nvtx(record_shapes=True).__enter__()


def stop_external_profiler() -> None:
    """Close the capture range."""
    if available():
        torch.cuda.cudart().cudaProfilerStop()


# Work beside the host --------------------------------------------------------------------------------------------


def record_graphs(
    modules: tuple[torch.nn.Module, ...], samples: tuple[tuple[Any, ...], ...]
) -> Sequence[Any]:
    """Callables that replay what the modules do with inputs like `samples`, forward and backward.

    RuntimeError without an accelerator.
    """
    if not available():
        raise RuntimeError("only an accelerator can record its kernels")
    return torch.cuda.make_graphed_callables(modules, samples, allow_unused_input=True)


def fetched_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches (dicts of tensors) on the device, each copied beside the computation that precedes its use.

    Copies run on a stream of their own from pinned memory, one batch ahead. Without an accelerator the iterator itself.
    """
    return _fetch_ahead(batches) if available() else batches


def _fetch_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    stream = torch.cuda.Stream()

    def fetch() -> tuple[dict[str, Any], Any] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            moved = {
                key: value.to(current(), non_blocking=True) if isinstance(value, torch.Tensor) else value
                for key, value in batch.items()
            }
        return moved, stream.record_event()

    pending = fetch()
    while pending is not None:
        batch, copied = pending
        torch.cuda.current_stream().wait_event(copied)
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                # Its memory is in use until that stream is done.
                value.record_stream(torch.cuda.current_stream())
        pending = fetch()
        yield batch


#: Conditions on their way to the host: (value in pinned memory, event of its arrival, the error it means).
_awaited: list[tuple[torch.Tensor, Any, Callable[[], Exception]]] = []


def raise_later(condition: torch.Tensor, error: Callable[[], Exception]) -> None:
    """Raise `error()` if a boolean scalar is true, without waiting for an accelerator to compute it.

    On the CPU at once. On an accelerator the value travels beside the computation, and `raise_awaited` looks at it.
    """
    if condition.device.type == "cpu":
        if bool(condition):
            raise error()
    elif condition.device.type != "meta":  # where nothing is computed nothing is wrong
        arrived = torch.empty((), dtype=torch.bool, pin_memory=True)
        arrived.copy_(condition, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        _awaited.append((arrived, event, error))


def raise_awaited(wait: bool = False) -> None:
    """Raise what the conditions that have arrived call for; with `wait` none is left undecided."""
    while _awaited and (wait or _awaited[0][1].query()):
        arrived, event, error = _awaited.pop(0)
        event.synchronize()
        if bool(arrived):
            _awaited.clear()
            raise error()
