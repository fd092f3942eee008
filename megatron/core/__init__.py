"""The library. Its names and modules are loaded when they are first used, so that importing this costs nothing."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from megatron.core.package_info import (
    __contact_emails__,
    __contact_names__,
    __description__,
    __download_url__,
    __homepage__,
    __keywords__,
    __license__,
    __package_name__,
    __repository_url__,
    __shortversion__,
    __version__,
)

if TYPE_CHECKING:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.inference_params import InferenceParams
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.timers import Timers

    mpu = parallel_state

__all__ = [
    "DistributedDataParallel",
    "InferenceParams",
    "ModelParallelConfig",
    "Timers",
    "__contact_emails__",
    "__contact_names__",
    "__description__",
    "__download_url__",
    "__homepage__",
    "__keywords__",
    "__license__",
    "__package_name__",
    "__repository_url__",
    "__shortversion__",
    "__version__",
    "mpu",
    "parallel_state",
    "tensor_parallel",
]

_HOMES = {
    "DistributedDataParallel": "distributed",
    "InferenceParams": "inference_params",
    "ModelParallelConfig": "model_parallel_config",
    "Timers": "timers",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    module = f"{__name__}.{'parallel_state' if name == 'mpu' else name}"
    if name.startswith("_") or importlib.util.find_spec(module) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(module)
