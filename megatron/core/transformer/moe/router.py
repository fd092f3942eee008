"""Which experts a token visits, and with what weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.errors import InvariantError
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    save_to_aux_losses_tracker,
    sinkhorn,
    switch_load_balancing_loss_func,
    topk_softmax_with_capacity,
    z_loss_func,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived


class Router(ABC, MegatronModule):
    """A linear layer from hidden states to one logit per expert, whole on every rank."""

    def __init__(self, config: TransformerConfig, *, pg_collection: Any = None) -> None:
        super().__init__(config)
        self.num_experts = derived(config.num_moe_experts)
        self.layer_number: int | None = None
        self.groups = parallel_state.resolve(pg_collection)
        weight = torch.empty((self.num_experts, config.hidden_size), dtype=torch.float32)
        if config.perform_initialization:
            # All tensor and expert parallel ranks must draw the same router; before the states are seeded their callers see
            # to that.
            states = get_cuda_rng_tracker()
            shared = get_data_parallel_rng_tracker_name()
            with states.fork(shared) if states.is_initialized() else nullcontext():
                derived(config.init_method)(weight)
        self.weight = torch.nn.Parameter(weight.to(config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def gating(self, input: Tensor) -> Tensor:
        """input [s/sp, b, h] -> logits [s/sp, b, e]."""
        return F.linear(input, self.weight)

    @abstractmethod
    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [.., e] -> probabilities and indices, as `topk_softmax_with_capacity` returns them."""

    @abstractmethod
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """input [s/sp, b, h] -> probabilities and indices."""

    def set_layer_number(self, layer_number: int) -> None:
        """Tell the router its place in the model (from 1), for logging."""
        self.layer_number = layer_number


def _softmax(logits: Tensor) -> Tensor:
    """Over experts, in fp32 or wider."""
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class TopKRouter(Router):
    """Each token visits the k experts with the largest logits, balanced by side losses or by assignment."""

    def __init__(self, config: TransformerConfig, *, pg_collection: Any = None) -> None:
        super().__init__(config, pg_collection=pg_collection)
        self.topk = config.moe_router_topk
        self.routing_type = config.moe_router_load_balancing_type

    def sinkhorn_load_balancing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [t, e] -> scores, indices [t, k]: assigned evenly in training, by the largest score
        otherwise.
        """
        if self.config.moe_aux_loss_coeff:
            raise InvariantError(
                "--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff",
                "sinkhorn balances by itself and takes no auxiliary loss",
                "leave the coefficient at 0, or choose aux_loss",
            )

        def scores_of(logits: Tensor) -> Tensor:
            if self.topk == 1:
                return torch.sigmoid(logits)
            return _softmax(logits).type_as(logits)

        if not self.training:
            return torch.topk(scores_of(logits), k=self.topk, dim=1)
        with torch.no_grad():
            indices = torch.topk(sinkhorn(logits.float()), k=self.topk, dim=1).indices
        return scores_of(logits).gather(1, indices), indices

    def aux_loss_load_balancing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [t, e] -> probabilities and indices, with the load-balancing loss attached in training."""
        probs, indices, per_expert = self._choose(logits)
        if self.training and self.config.moe_aux_loss_coeff > 0:
            scores = _softmax(logits)
            probs = self.apply_load_balancing_loss(scores, per_expert, activation=probs)
        return probs, indices

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        return topk_softmax_with_capacity(
            logits,
            self.topk,
            capacity_factor=config.moe_expert_capacity_factor,
            pad_to_capacity=config.moe_pad_expert_input_to_capacity,
            drop_policy=config.moe_token_drop_policy,
            use_pre_softmax=config.moe_router_pre_softmax,
            deterministic_mode=config.deterministic_mode,
        )

    def apply_load_balancing_loss(
        self, probs: Tensor, num_local_tokens_per_expert: Tensor, activation: Tensor
    ) -> Tensor:
        """Attach the load-balancing loss of probs [t, e] and counts [e] to `activation`, which is returned."""
        coefficient = self.config.moe_aux_loss_coeff
        group = self.groups.tp_cp
        loss = switch_load_balancing_loss_func(
            probs, num_local_tokens_per_expert, self.topk, coefficient, sequence_partition_group=group
        )
        save_to_aux_losses_tracker(
            "load_balancing_loss",
            loss / coefficient,
            self.layer_number,
            self.config.num_layers,
            reduce_group=group,
        )
        return MoEAuxLossAutoScaler.apply(activation, loss)

    def apply_z_loss(self, logits: Tensor) -> Tensor:
        """Attach the z-loss of logits [t, e] to them, in training and if it has a coefficient."""
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training:
            return logits
        # Every rank of the sequence attaches the mean over its own tokens.
        share = coefficient / (self.groups.size("tp") * self.groups.size("cp"))
        loss = z_loss_func(logits, share)
        save_to_aux_losses_tracker(
            "z_loss", loss / share, self.layer_number, self.config.num_layers, avg_group=self.groups.tp_cp
        )
        return MoEAuxLossAutoScaler.apply(logits, loss)

    def apply_input_jitter(self, input: Tensor) -> Tensor:
        """Multiply by noise from [1 - eps, 1 + eps], in training and if asked for."""
        eps = self.config.moe_input_jitter_eps
        if eps is None or not self.training:
            return input
        return input * torch.empty_like(input).uniform_(1.0 - eps, 1.0 + eps)

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [.., e] -> probabilities and indices."""
        # A layer that is only built may leave this open, as in v0.9.
        if not 1 <= self.topk <= self.num_experts:
            raise InvariantError(
                "moe_router_topk (--moe-router-topk)",
                f"each token is to be sent to {self.topk} of {self.num_experts} experts",
                "choose a top-k between 1 and the number of experts",
            )
        logits = self.apply_z_loss(logits.reshape(-1, logits.size(-1)))
        if self.routing_type == "sinkhorn":
            return self.sinkhorn_load_balancing(logits)
        if self.routing_type == "aux_loss":
            return self.aux_loss_load_balancing(logits)
        if self.routing_type == "none":
            return self._choose(logits)[:2]
        raise ValueError(
            f"moe_router_load_balancing_type is aux_loss, sinkhorn or none, not {self.routing_type!r}"
        )

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """input [s/sp, b, h] -> probabilities and expert indices [t, k] (padded: [e, c] with token indices)."""
        return self.routing(self.gating(self.apply_input_jitter(input)))
