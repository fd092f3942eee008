"""Data parallelism: gradient buckets, the wrapper around a model, and what follows the last backward."""

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.distributed.param_and_grad_buffer import ParamAndGradBuffer

__all__ = [
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "ParamAndGradBuffer",
    "finalize_model_grads",
]
