"""`--log-straggler`: with the log line, which ranks' devices are slow."""

from __future__ import annotations

from argparse import Namespace

import torch.distributed as dist

from megatron.core.straggler import StragglerDetector


class StragglerLog:
    """Has the detector, which the entry scripts' forward steps enter, report once per log interval."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._detector = StragglerDetector()
        self._flops_reported = args.num_floating_point_operations_so_far
        if args.log_straggler:
            self._detector.configure(
                dist.get_world_size(),
                dist.get_rank(),
                mmcnt=args.straggler_minmax_count,
                port=args.straggler_ctrlr_port,
                enabled=not args.disable_straggler_on_startup,
            )

    def after(self, iteration: int) -> None:
        """Report if this iteration has a log line. All ranks must call."""
        args = self._args
        if args.log_straggler and iteration % args.log_interval == 0:
            flops = args.num_floating_point_operations_so_far
            self._detector.report(flops - self._flops_reported, args.log_interval)
            self._flops_reported = flops
