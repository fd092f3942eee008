"""Classic import path of the asynchronous save."""

from megatron.training.checkpointing.asynchronous import maybe_finalize_async_save, schedule_async_save

__all__ = ["maybe_finalize_async_save", "schedule_async_save"]
