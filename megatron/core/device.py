"""The device: which one, its backend name, random state, memory and synchronisation; plain no-ops on the CPU.

This is the only file of the library's lower layers that spells the accelerator's name. Everything above asks
these functions and therefore runs unchanged on a laptop.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

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
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return current()


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
