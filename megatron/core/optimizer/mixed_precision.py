"""Training with half-precision parameters: fp32 main copies, the loss scale, and skipping steps that overflow."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.errors import CheckpointError
from megatron.core.optimizer.clip_grads import all_reduce
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.optimizer.optimizer import (
    InitState,
    MegatronOptimizer,
    drop_grads,
    flatten,
    restore_torch_state,
    sharded_torch_state,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.tensor_parallel.placement import copy_tensor_model_parallel_attributes
from megatron.core.timers import timed
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)


def main_copy(param: Tensor, values: Tensor) -> Tensor:
    """`values` as a tensor that counts in norms the way `param` does."""
    copy_tensor_model_parallel_attributes(values, param)
    if hasattr(param, "shared"):
        values.shared = param.shared  # type: ignore[attr-defined]
    return values


class MixedPrecisionOptimizer(MegatronOptimizer):
    """What optimizers with main copies share: unscaling, the overflow check, and the order of a step.

    Without a scaler (bf16, or fp32 under the distributed optimizer) nothing is scaled and nothing is checked.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        grad_scaler: MegatronGradScaler | None,
        init_state_fn: InitState,
    ) -> None:
        super().__init__(optimizer, config, init_state_fn)
        self.grad_scaler = grad_scaler
        self._unit_scale = torch.ones(1, dtype=torch.float32, device=device.current())

    def get_loss_scale(self) -> Tensor:
        """The scaler's current factor, 1 without a scaler; [1] fp32."""
        return self._unit_scale if self.grad_scaler is None else self.grad_scaler.scale

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the current scale."""
        return loss if self.grad_scaler is None else self.grad_scaler.scale * loss

    @abstractmethod
    def _copy_model_grads_to_main_grads(self) -> None:
        """Set `.grad` of the parameters that are updated."""

    @abstractmethod
    def _copy_main_params_to_model_params(self) -> None:
        """Write updated main copies into the model."""

    @abstractmethod
    def _copy_model_params_to_main_params(self) -> None:
        """Take the model's parameters over into the main copies."""

    def reload_model_params(self) -> None:
        """Take the model's parameters over into the main copies."""
        self._copy_model_params_to_main_params()

    def _unscale_and_find_inf(self) -> bool:
        """Divide all main gradients by the loss scale; whether any rank holds one that is not finite."""
        assert self.grad_scaler is not None, "there is nothing to unscale without a scaler"
        found_inf = torch.zeros(1, dtype=torch.float32, device=device.current())
        grads = [param.grad for param in self.get_parameters() if param.grad is not None]
        if grads:
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, self.grad_scaler.inv_scale)
        all_reduce(found_inf, dist.ReduceOp.MAX, self.get_model_parallel_group())
        return bool(found_inf.item() > 0)

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Copy gradients to the main copies, unscale and check them, adapt the scale; True to skip the step."""
        with timed(self.config, "optimizer-copy-to-main-grad"):
            self._copy_model_grads_to_main_grads()
        if self.grad_scaler is None:
            return False
        with timed(self.config, "optimizer-unscale-and-check-inf"):
            found_inf = self._unscale_and_find_inf()
        self.grad_scaler.update(found_inf)
        return found_inf

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update the main copies, then the model."""
        self._inner_step()
        # Copies of half-precision gradients must not stay alive through the next forward and backward.
        drop_grads(self.get_parameters())
        with timed(self.config, "optimizer-copy-main-to-model-params"):
            self._copy_main_params_to_model_params()
        return True

    def _scaler_state(self) -> dict[str, Any]:
        """The checkpoint entry of the scaler, if there is one."""
        return {} if self.grad_scaler is None else {"grad_scaler": self.grad_scaler.state_dict()}

    def _load_scaler_state(self, state_dict: dict[str, Any]) -> None:
        """Continue the loss scale; a difference in having one is only worth a line in the log."""
        if "grad_scaler" not in state_dict:
            if self.config.fp16:
                log_single_rank(
                    logger,
                    logging.WARNING,
                    "the checkpoint holds no loss scale; starting from the initial one",
                )
        elif self.grad_scaler is None:
            log_single_rank(
                logger, logging.WARNING, "this run does not scale the loss; ignoring the checkpoint's scale"
            )
        else:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


class Float16OptimizerWithFloat16Params(MixedPrecisionOptimizer):
    """fp16 or bf16 parameters with whole fp32 main copies on every rank; fp32 parameters are updated in place.

    `float16_groups` and `fp32_from_float16_groups` are twins, group by group; `fp32_from_fp32_groups` the others.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        grad_scaler: MegatronGradScaler | None,
        init_state_fn: InitState,
    ) -> None:
        super().__init__(optimizer, config, grad_scaler, init_state_fn)
        self.float16_groups: list[list[Tensor]] = []
        self.fp32_from_float16_groups: list[list[Tensor]] = []
        self.fp32_from_fp32_groups: list[list[Tensor]] = []
        self._model_params: list[Tensor] = self.get_parameters()
        for group in optimizer.param_groups:
            halves, copies, fulls = [], [], []
            for position, param in enumerate(group["params"]):
                if param.dtype in HALF:
                    copy = main_copy(param, param.detach().clone().float())
                    group["params"][position] = copy
                    if param in optimizer.state:
                        optimizer.state[copy] = optimizer.state.pop(param)
                    halves.append(param)
                    copies.append(copy)
                else:
                    fulls.append(param)
            self.float16_groups.append(halves)
            self.fp32_from_float16_groups.append(copies)
            self.fp32_from_fp32_groups.append(fulls)
        self._halves = flatten(self.float16_groups)
        self._copies = flatten(self.fp32_from_float16_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what autograd left on the model, and the main gradients."""
        drop_grads(self._model_params, set_to_none)
        drop_grads(self._copies, set_to_none)

    def _copy_model_grads_to_main_grads(self) -> None:
        for model, main in zip(self._halves, self._copies):
            # fp32 buffers are read in place; half ones are widened.
            grad = model.main_grad if hasattr(model, "main_grad") else model.grad
            main.grad = None if grad is None else grad.float()
            model.grad = None
        for param in flatten(self.fp32_from_fp32_groups):
            if hasattr(param, "main_grad"):
                param.grad = param.main_grad

    def _copy_main_params_to_model_params(self) -> None:
        if self._halves:
            torch._foreach_copy_([param.detach() for param in self._halves], self._copies)

    @torch.no_grad()
    def _copy_model_params_to_main_params(self) -> None:
        if self._halves:
            torch._foreach_copy_(self._copies, [param.detach() for param in self._halves])

    def state_dict(self) -> dict[str, Any]:
        """The torch optimizer's dict, the loss scale, and the main copies group by group."""
        return {
            "optimizer": self.optimizer.state_dict(),
            **self._scaler_state(),
            "fp32_from_fp16_params": self.fp32_from_float16_groups,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from either checkpoint format; names of earlier releases are understood."""
        inner = state_dict["optimizer"] if "optimizer" in state_dict else state_dict["optimizer_state_dict"]
        restore_torch_state(self.optimizer, inner)
        self._load_scaler_state(state_dict)
        key = "fp32_from_fp16_params" if "fp32_from_fp16_params" in state_dict else "fp32_from_fp16"
        copies = flatten(state_dict[key])
        if [copy.shape for copy in copies] != [copy.shape for copy in self._copies]:
            raise CheckpointError(
                "optimizer state",
                f"the checkpoint's {len(copies)} fp32 copies do not have the shapes of this model's "
                f"{len(self._copies)} half-precision parameters",
                "use the flags the checkpoint was trained with, or --no-load-optim",
            )
        with torch.no_grad():
            for own, stored in zip(self._copies, copies):
                own.copy_(stored)

    def sharded_state_dict(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False
    ) -> ShardedStateDict:
        """`optimizer.state.{fp32_param, <moment>}.<model key>` for every parameter, cut as the model's tensor is."""
        # Also to be saved: while every step was skipped for its loss scale there is none yet, and a load expects some.
        self.init_state_fn(self.optimizer)
        state_dict = self.state_dict()
        inner = state_dict["optimizer"]
        sharded_params = sharded_torch_state(inner, self._model_params, model_sharded_state_dict)
        number_of = {param: number for number, param in enumerate(self._model_params)}
        state_dict["fp32_from_fp16_params"] = [
            [
                make_sharded_optimizer_tensor(
                    sharded_params[number_of[model]], main, prefix="optimizer.state.fp32_param"
                )
                for model, main in zip(models, mains)
            ]
            for models, mains in zip(self.float16_groups, self.fp32_from_float16_groups)
        ]
        return state_dict
