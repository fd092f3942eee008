"""Collectives whose names changed between torch releases, under the newer name."""

from __future__ import annotations

import torch.distributed as dist

#: Gather equal tensors of all ranks into one, stacked or concatenated along dim 0.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
#: Sum one tensor over all ranks and keep this rank's part along dim 0.
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
