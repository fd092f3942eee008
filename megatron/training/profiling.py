"""`--profile`: mark steps for an external profiler, or record them with PyTorch's."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import device


class Profiler:
    """Profiles the steps from `--profile-step-start` to `--profile-step-end` on `--profile-ranks`."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._active = args.profile and dist.get_rank() in args.profile_ranks
        self._torch: Any = None
        if self._active and args.use_pytorch_profiler:
            start = args.profile_step_start
            self._torch = torch.profiler.profile(
                schedule=torch.profiler.schedule(
                    wait=max(start - 1, 0),
                    warmup=1 if start > 0 else 0,
                    active=args.profile_step_end - start,
                    repeat=1,
                ),
                on_trace_ready=torch.profiler.tensorboard_trace_handler(args.tensorboard_dir),
                record_shapes=True,
                with_stack=True,
            )
            self._torch.start()

    def before(self, iteration: int) -> None:
        """Call before step `iteration + 1`."""
        if self._torch is not None:
            self._torch.step()
        elif self._active and iteration == self._args.profile_step_start:
            device.start_external_profiler()

    def after(self, iteration: int) -> None:
        """Call after step `iteration`."""
        if self._active and iteration == self._args.profile_step_end:
            if self._torch is not None:
                self._torch.stop()
                self._torch = None
            else:
                device.stop_external_profiler()
