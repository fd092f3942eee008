"""Small helpers under their known names; no policy.

A few v0.9 names of this module belong to higher layers today. They are still reachable here (see `_MOVED`) without
this module importing upwards.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device

if TYPE_CHECKING:
    from packaging.version import Version

T = TypeVar("T")
InitMethod = Callable[[Tensor], Any]

#: v0.9 name -> the module that owns it now.
_MOVED = {
    "make_tp_sharded_tensor_for_checkpoint": "megatron.core.tensor_parallel.placement",
    "make_sharded_tensor_for_checkpoint": "megatron.core.tensor_parallel.placement",
    "make_sharded_object_for_checkpoint": "megatron.core.tensor_parallel.placement",
    "prepare_input_tensors_for_wgrad_compute": "megatron.core.tensor_parallel.linear",
    "drain_embedding_wgrad_compute": "megatron.core.tensor_parallel.linear",
    "check_param_hashes_across_dp_replicas": "megatron.core.replicas",
    "log_on_each_pipeline_stage": "megatron.core.replicas",
    "StragglerDetector": "megatron.core.straggler",
}


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        return getattr(importlib.import_module(_MOVED[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Integers ---------------------------------------------------------------------------------------------------------


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """AssertionError unless `denominator` divides `numerator`."""
    assert numerator % denominator == 0, f"{numerator} is not divisible by {denominator}"


def divide(numerator: int, denominator: int) -> int:
    """The quotient of an exact division; AssertionError where a remainder is left."""
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


# Transformer Engine -----------------------------------------------------------------------------------------------


@functools.cache
def get_te_version() -> Version | None:
    """The installed Transformer Engine's version, a `packaging.version.Version`, or None without it."""
    try:
        text = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return None
    from packaging.version import Version  # optional: Transformer Engine brings it along

    return Version(text)


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `1.10.0.dev0+abc` -> (1, 10, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def is_te_min_version(version: str, check_equality: bool = True) -> bool:
    """True if Transformer Engine of this version or newer is installed (check_equality=False: strictly newer)."""
    installed = get_te_version()
    if installed is None:
        return False
    # Release numbers alone: a development version counts as the release it leads to.
    wanted = _release(version)
    return installed.release >= wanted if check_equality else installed.release > wanted


def is_float8tensor(tensor: Tensor) -> bool:
    """True for Transformer Engine's fp8 weights."""
    return get_te_version() is not None and type(tensor).__name__ == "Float8Tensor"


# Wrapped models ---------------------------------------------------------------------------------------------------


def get_attr_wrapped_model(
    model: Any, attr: str, allow_none: bool = True, return_model_obj: bool = False
) -> Any:
    """An attribute of the innermost of nested wrappers (`wrapper.module.module ..`) that has it.

    allow_none=False skips levels where it is None; return_model_obj returns the level instead of the value.
    RuntimeError for a list of model chunks, or if no level has the attribute.
    """
    if isinstance(model, list):
        raise RuntimeError(f"looking for {attr!r}: pass one model chunk, not a list of them")
    level = model
    while level is not None:
        found = getattr(level, attr, None)
        if hasattr(level, attr) and (allow_none or found is not None):
            return level if return_model_obj else found
        level = getattr(level, "module", None)
    raise RuntimeError(f"neither {type(model).__name__} nor a module wrapped in it has an attribute {attr!r}")


def get_model_type(model: Any) -> Any:
    """The ModelType of a (wrapped) model."""
    return get_attr_wrapped_model(model, "model_type")


def get_model_xattn(model: Any) -> bool:
    """True if the model's layers contain cross-attention; False where it does not say."""
    try:
        return get_attr_wrapped_model(model, "xattn_needed")
    except RuntimeError:
        return False


def get_model_config(model: Any) -> Any:
    """The configuration of a (wrapped) model."""
    return get_attr_wrapped_model(model, "config", allow_none=False)


# Tensors ----------------------------------------------------------------------------------------------------------


class GlobalMemoryBuffer:
    """A pool of scratch tensors, one per (name, dtype), that grow and are reused.

    The content is valid until the next request with the same name and dtype, so a buffer must never be saved for
    backward.
    """

    def __init__(self) -> None:
        self.buffer: dict[tuple[str, torch.dtype], Tensor] = {}

    def get_tensor(self, tensor_shape: Sequence[int], dtype: torch.dtype, name: str) -> Tensor:
        """An uninitialised tensor of this shape on the current device."""
        numel = functools.reduce(operator.mul, tensor_shape, 1)
        key = (name, dtype)
        if key not in self.buffer or self.buffer[key].numel() < numel:
            with torch.inference_mode(False):  # the buffer outlives an inference-mode caller
                self.buffer[key] = torch.empty(numel, dtype=dtype, device=device.current())
        return self.buffer[key][:numel].view(*tensor_shape)


class MakeViewlessTensor(torch.autograd.Function):
    """Identity in the graph whose output is no view of its input."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, requires_grad: bool) -> Tensor:
        """A tensor of any shape, sharing memory with `inp` but not its `_base`."""
        return _without_base(inp, requires_grad)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """The gradient unchanged."""
        return grad_output, None


def _without_base(inp: Tensor, requires_grad: bool) -> Tensor:
    out = torch.empty((1,), dtype=inp.dtype, device=inp.device, requires_grad=requires_grad)
    out.data = inp.data
    return out


def make_viewless_tensor(inp: Tensor, requires_grad: bool, keep_graph: bool) -> Tensor:
    """The tensor itself if it is no view, else one sharing its memory without referring to the viewed base.

    A view keeps its base alive; the pipeline frees outputs by replacing `.data`, which only works without a base.
    keep_graph: stay connected to the autograd graph.
    """
    if inp._base is None:
        return inp
    if keep_graph:
        return MakeViewlessTensor.apply(inp, requires_grad)
    return _without_base(inp, requires_grad)


def assert_viewless_tensor(tensor: Tensor | list[Any], extra_msg: str | None = None) -> Tensor | list[Any]:
    """AssertionError if a tensor (or one in the list) is a view; other values pass. Returns the argument."""
    if isinstance(tensor, list):
        for each in tensor:
            assert_viewless_tensor(each, extra_msg)
        return tensor
    if isinstance(tensor, Tensor):
        assert tensor._base is None, (
            "replacing the data of a view would leave its base in memory; make it viewless first. "
            + (extra_msg or "")
        )
    return tensor


def safely_set_viewless_tensor_data(tensor: Tensor, new_data_tensor: Tensor) -> None:
    """Replace `tensor.data`, refusing a view, whose base would keep the old memory."""
    assert_viewless_tensor(
        tensor,
        extra_msg=f"Tensor of shape {tuple(tensor.shape)}, new data of shape {tuple(new_data_tensor.shape)}.",
    )
    tensor.data = new_data_tensor


# Initialisation ---------------------------------------------------------------------------------------------------


def init_method_normal(sigma: float) -> InitMethod:
    """Fill with draws from N(0, sigma)."""
    return functools.partial(torch.nn.init.normal_, mean=0.0, std=sigma)


def scaled_init_method_normal(sigma: float, num_layers: int) -> InitMethod:
    """Fill with draws from N(0, sigma / sqrt(2 layers)), so that residual sums keep their scale (GPT-2)."""
    return functools.partial(torch.nn.init.normal_, mean=0.0, std=sigma / math.sqrt(2.0 * num_layers))


# Logging ----------------------------------------------------------------------------------------------------------


def log_single_rank(logger: logging.Logger, *args: Any, rank: int = 0, **kwargs: Any) -> None:
    """`logger.log(*args)` on one rank of the world (or without torch.distributed)."""
    if not dist.is_initialized() or dist.get_rank() == rank:
        logger.log(*args, **kwargs)


# Lists of tensors, with the calling convention of apex's multi-tensor functions -----------------------------------


def local_multi_tensor_applier(
    op: Callable[..., T], noop_flag_buffer: Tensor, tensor_lists: list[list[Tensor]], *args: Any
) -> T:
    """Call `op(chunk size, flag, lists, ..)`; torch's foreach functions need no chunking, so the size is nominal."""
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def local_multi_tensor_l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *args: Any
) -> tuple[Tensor, Tensor | None]:
    """The L2 norm [1] over all tensors of the first list and, if per_tensor, each tensor's own [n]."""
    tensors = tensor_lists[0]
    if not tensors:
        return torch.zeros(1, device=device.current()), torch.zeros(0, device=device.current())
    # Squares of half-precision values neither fit nor add up in half precision.
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=wide))
    return torch.linalg.vector_norm(norms).reshape(1), norms if per_tensor else None


def local_multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> None:
    """Write `source * scale` into the destinations; tensor_lists = [sources, destinations].

    Sets noop_flag to 1 if a source holds an infinity or NaN.
    """
    sources, destinations = tensor_lists
    if not all(torch.isfinite(source).all() for source in sources):
        noop_flag.fill_(1)
    for source, destination in zip(sources, destinations):
        torch.mul(source, scale, out=destination)
