"""Which experts a run's tokens visit: written down in one process, and prescribed to another layout.

In bf16 the order of a sum moves a logit by a rounding unit, and a token between two experts whose logits are equal within it
goes to another one: its output and its gradients are another function's, however right the layout is. Comparing layouts
therefore takes the choice of experts as given, and looks at the choices themselves apart from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.training.global_vars import get_args

#: Expert indices [s, b, k] of every micro-batch of a run, by layer (from 1).
Routes = dict[int, list[Tensor]]


@dataclass
class Rerouted:
    """What a run would have chosen otherwise: how many of its assignments, and by what margin at most.

    The margin is the distance of the two experts' logits, relative to the largest logit of the token.
    """

    assignments: int = 0
    of: int = 0
    margin: float = 0.0

    def note(self, logits: Tensor, wanted: Tensor) -> None:
        """logits [t, e], wanted [t, k]: the experts prescribed."""
        best = logits.topk(wanted.size(1), dim=1)
        given = torch.zeros_like(logits).scatter(1, wanted, 1.0)
        own = torch.zeros_like(logits).scatter(1, best.indices, 1.0)
        self.of += wanted.numel()
        self.assignments += int((given < own).sum())
        # A prescribed expert may be below the last one chosen by a rounding, not by more.
        below = best.values[:, -1:] - logits.gather(1, wanted)
        share = below / logits.abs().amax(1, keepdim=True)
        self.margin = max(self.margin, share.max().item())


@dataclass
class Routing:
    """Follows the routers of a run. With `given`, the run takes those choices and notes its own in `rerouted`."""

    given: Routes = field(default_factory=dict)
    routes: Routes = field(default_factory=dict)
    rerouted: Rerouted = field(default_factory=Rerouted)

    @contextlib.contextmanager
    def follow(self) -> Iterator[None]:
        """Until the end of the block."""
        forward, topk = TopKRouter.forward, torch.topk

        def watched(router: TopKRouter, hidden: Tensor) -> Any:
            s, b = hidden.shape[:2]
            layer = self.routes.setdefault(router.layer_number or 0, [])
            wanted = self._share(router.layer_number or 0, len(layer)) if self.given else None

            def choose(logits: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
                indices = topk(logits, k, dim=dim).indices
                if wanted is not None:
                    indices = wanted.reshape(-1, k)
                    self.rerouted.note(logits.detach().float(), indices)
                layer.append(indices.view(s, b, k))
                return logits.gather(dim, indices), indices

            with mock.patch.object(torch, "topk", choose):
                return forward(router, hidden)

        with mock.patch.object(TopKRouter, "forward", watched):
            yield

    def _share(self, layer: int, call: int) -> Tensor:
        """What was given for the tokens of this rank [s/sp, b, k] in its micro-batch number `call` of the run."""
        args = get_args()
        replicas = args.data_parallel_size
        per_step = args.global_batch_size // (args.micro_batch_size * replicas)
        step, micro = divmod(call, per_step)
        whole = self.given[layer][
            (step * per_step + micro) * replicas + parallel_state.get_data_parallel_rank()
        ]
        if not args.sequence_parallel:
            return whole
        parts = whole.chunk(parallel_state.get_tensor_model_parallel_world_size())
        return parts[parallel_state.get_tensor_model_parallel_rank()]
