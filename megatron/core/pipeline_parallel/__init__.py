"""Pipeline parallelism: schedules are data (plan.py), one executor runs them (executor.py)."""

from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

__all__ = ["get_forward_backward_func"]
