"""What every optimizer offers the training loop, and the one for models trained in the precision of their parameters."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from megatron.core.errors import CheckpointError, ConfigError
from megatron.core.optimizer.adam import Adam
from megatron.core.optimizer.clip_grads import (
    clip_grad_by_total_norm_fp32,
    count_zeros_fp32,
    counts_once,
    grad_norm_tensor,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_groups import group_key
from megatron.core.timers import timed

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

# v0.9 name in this module -> the module that owns it now; they build on this one.
_MOVED = {
    "MixedPrecisionOptimizer": "megatron.core.optimizer.mixed_precision",
    "Float16OptimizerWithFloat16Params": "megatron.core.optimizer.mixed_precision",
    "ChainedOptimizer": "megatron.core.optimizer.chained",
    "ProxyDict": "megatron.core.optimizer.chained",
}

StepResult = tuple[bool, "float | Tensor | None", "float | None"]
InitState = Callable[[torch.optim.Optimizer], None]


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        return getattr(importlib.import_module(_MOVED[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its (zero) state, so that there is something to load a checkpoint into."""
    if isinstance(optimizer, Adam):
        optimizer.init_state()
        return
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for param in group["params"]:
                if not optimizer.state[param]:
                    optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)


def match_param_groups(
    own: list[dict[str, Any]], stored: list[dict[str, Any]], *, by_identity: bool
) -> list[dict[str, Any]]:
    """The groups to continue with: values from a checkpoint, parameter lists of this run.

    Checkpoints in the torch format hold this very rank's groups, in order. Those in a distributed format hold
    rank 0's for everyone: `by_identity` then finds each group's twin by what defines it (a rank whose first
    parameter does not decay has them in another order), and a group that rank 0 lacks keeps its own values but the step.
    Raises CheckpointError if the numbers of groups differ without `by_identity`.
    """
    if not by_identity and len(own) != len(stored):
        raise CheckpointError(
            "optimizer state",
            f"the checkpoint has {len(stored)} parameter groups, this model {len(own)}",
            "use the flags the checkpoint was trained with, or --no-load-optim",
        )
    twins = {group_key(group): group for group in stored}
    steps = [group["step"] for group in stored if "step" in group]
    result = []
    for position, group in enumerate(own):
        twin = twins.get(group_key(group), {}) if by_identity else stored[position]
        merged = {key: twin.get(key, value) for key, value in group.items() if key != "params"}
        if "step" in twin or (steps and not twin):
            merged["step"] = int(twin.get("step", steps[0] if steps else 0))
        merged["params"] = group["params"]
        result.append(merged)
    return result


class MegatronOptimizer(ABC):
    """A torch optimizer wrapped in what a large run needs: main gradients, global norm, loss scale, state formats.

    `config` is an OptimizerConfig; `init_state_fn` allocates the torch optimizer's state before a load. Collective
    methods (`step`, `get_grad_norm`, `clip_grad_norm`, `count_zeros`) must be called by all ranks of the model.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        init_state_fn: InitState = lambda optimizer: None,
    ) -> None:
        self.optimizer = optimizer
        self.config = config
        self.init_state_fn = init_state_fn
        self.model_chunks: list[DistributedDataParallel] = []
        self.model_parallel_group: ProcessGroup | None = None
        self._norm_params: list[Tensor] | None = None

    # Parameters and gradients -------------------------------------------------------------------------------------

    def get_parameters(self) -> list[Tensor]:
        """The parameters the torch optimizer updates, group after group."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def get_main_grads_for_grad_norm(self) -> list[Tensor]:
        """Gradients this rank accounts for in the global norm: no second copy of a tied weight, no tp duplicate."""
        if self._norm_params is None:
            self._norm_params = [param for param in self.get_parameters() if counts_once(param)]
        return [param.grad for param in self._norm_params if param.grad is not None]

    def get_model_parallel_group(self) -> ProcessGroup | None:
        """The ranks over which norm, zero count and overflow are combined; None is the whole world."""
        if self.model_parallel_group is not None:
            return self.model_parallel_group
        return parallel_state.resolve(None).mp

    @abstractmethod
    def prepare_grads(self) -> bool:
        """Bring the gradients into the form the torch optimizer reads; True if they overflowed (skip this step)."""

    @abstractmethod
    def step_with_ready_grads(self) -> bool:
        """Update from prepared (and clipped) gradients; True if parameters changed."""

    def grad_norm_tensor(self) -> Tensor:
        """The global gradient norm as a scalar on the device."""
        return grad_norm_tensor(
            self.get_main_grads_for_grad_norm(), model_parallel_group=self.get_model_parallel_group()
        )

    def get_grad_norm(self) -> float:
        """The global L2 norm of the gradients."""
        return self.grad_norm_tensor().item()

    def clip_grad_norm(self, clip_grad: float) -> float | Tensor:
        """Scale all gradients so that their global norm is at most `clip_grad`; returns the norm before.

        A float on the CPU. On an accelerator a scalar tensor that has not been waited for: float() does.
        """
        norm = self.grad_norm_tensor()
        self.clip_by(clip_grad, norm)
        return norm.item() if norm.device.type == "cpu" else norm

    def clip_by(self, clip_grad: float, total_norm: float | Tensor) -> None:
        """Scale all gradients of this optimizer by clip_grad / total_norm where that is below 1."""
        clip_grad_by_total_norm_fp32(self.get_parameters(), clip_grad, total_norm)

    def count_zeros(self) -> float:
        """How many gradient elements of the whole model are exactly zero."""
        return count_zeros_fp32(self.get_parameters(), model_parallel_group=self.get_model_parallel_group())

    @abstractmethod
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that autograd left on parameters (the flat buffers are DDP's to zero)."""

    # The step -----------------------------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """Prepare, clip, count, update. Returns (updated, gradient norm or None, zeros or None).

        A step whose gradients overflow changes nothing but the loss scale and returns (False, None, None).
        """
        if self.prepare_grads():
            return False, None, None
        grad_norm: float | Tensor | None = None
        if self.config.clip_grad > 0.0:
            with timed(self.config, "optimizer-clip-main-grad"):
                grad_norm = self.clip_grad_norm(self.config.clip_grad)
        num_zeros = None
        if self.config.log_num_zeros_in_grad:
            with timed(self.config, "optimizer-count-zeros"):
                num_zeros = self.count_zeros()
        return self.step_with_ready_grads(), grad_norm, num_zeros

    def _inner_step(self) -> None:
        """Apply the update rule; ConfigError while a group has no learning rate."""
        if any(group["lr"] is None for group in self.param_groups):
            raise ConfigError(
                "lr",
                "no learning rate was set",
                "give OptimizerConfig one, or make an OptimizerParamScheduler first",
            )
        with timed(self.config, "optimizer-inner-step"):
            self.optimizer.step()

    def get_loss_scale(self) -> Tensor:
        """The current loss scale, [1] fp32."""
        return torch.ones(1, dtype=torch.float32, device=device.current())

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return loss

    def start_param_sync(self, model_index: int, *unused: Any) -> None:  # noqa: B027 part of the interface
        """Nothing: parameters are gathered by the model chunks themselves."""

    @abstractmethod
    def reload_model_params(self) -> None:
        """Take the model's parameters over into the optimizer's copies, after loading weights alone."""

    # State --------------------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The torch optimizer's groups, with the extra keys of this framework."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The torch optimizer's state: parameter -> moments."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint in the torch format."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state made by `state_dict`, or loaded through `sharded_state_dict`."""

    @abstractmethod
    def sharded_state_dict(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False
    ) -> ShardedStateDict:
        """The state for a checkpoint in a distributed format, described like the model's own tensors."""


def sharded_torch_state(
    state_dict: dict[str, Any], model_params: Iterable[Any], model_sharded_state_dict: ShardedStateDict
) -> dict[int, Any]:
    """Replace the tensors of a torch optimizer's state dict by sharded ones, in place; returns what each parameter is.

    `model_params` are the model's parameters in the order in which the state numbers them. Groups are stored without
    parameter lists, decaying ones first: every rank reads rank 0's, some readers by position.
    """
    sharded_params = get_param_id_to_sharded_param_map(model_sharded_state_dict, model_params)
    groups = state_dict["param_groups"]
    optim_state_to_sharding_state(state_dict, sharded_params, exclude_keys=("step",))
    # v0.9's entry for a step that all parameters share; here, as in its fused Adam, the groups have it.
    state_dict["state"]["common_step"] = None
    state_dict["param_groups"] = portable_groups(groups)
    return sharded_params


def portable_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups without their parameters, the decaying ones first on every rank."""
    bare = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return sorted(bare, key=lambda group: -group_key(group).wd_mult)


def restore_torch_state(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Load a torch optimizer's state from either checkpoint format (see `match_param_groups`)."""
    distributed_format = any("params" not in group for group in stored["param_groups"])
    state = dict(stored["state"])
    common_step = state.pop("common_step", None)
    numbered = optimizer.state_dict()["param_groups"]
    groups = match_param_groups(numbered, stored["param_groups"], by_identity=distributed_format)
    if not distributed_format:
        for own, group, saved in zip(numbered, groups, stored["param_groups"]):
            if len(own["params"]) != len(saved["params"]):
                raise CheckpointError(
                    "optimizer state",
                    f"a parameter group has {len(saved['params'])} parameters in the checkpoint, "
                    f"{len(own['params'])} in this model",
                    "use the flags the checkpoint was trained with, or --no-load-optim",
                )
            group["params"] = saved["params"]
    if common_step is not None:
        for group in groups:
            group["step"] = int(common_step)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


class FP32Optimizer(MegatronOptimizer):
    """For models whose parameters are updated as they are: fp32, or float64 for reference runs."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: OptimizerConfig, init_state_fn: InitState
    ) -> None:
        super().__init__(optimizer, config, init_state_fn)
        self._scale = torch.ones(1, dtype=torch.float32, device=device.current())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what autograd left on the parameters."""
        drop_grads(self.get_parameters(), set_to_none)

    def get_loss_scale(self) -> Tensor:
        """Always 1."""
        return self._scale

    def prepare_grads(self) -> bool:
        """Let the torch optimizer read the flat buffers. Never skips a step."""
        with timed(self.config, "optimizer-copy-to-main-grad"):
            for param in self.get_parameters():
                if hasattr(param, "main_grad"):
                    param.grad = param.main_grad
        return False

    def step_with_ready_grads(self) -> bool:
        """Update, and let go of the buffers: autograd would otherwise add into them behind the hooks' back."""
        self._inner_step()
        drop_grads([param for param in self.get_parameters() if hasattr(param, "main_grad")])
        return True

    def reload_model_params(self) -> None:
        """Nothing: there are no copies."""

    def state_dict(self) -> dict[str, Any]:
        """The torch optimizer's own dict."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from either checkpoint format."""
        restore_torch_state(self.optimizer, state_dict)

    def sharded_state_dict(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False
    ) -> ShardedStateDict:
        """`optimizer.state.<moment>.<model key>` for every parameter, cut as the model's tensor is."""
        # Also to be saved: while every step was skipped for its loss scale there is none yet, and a load expects some.
        self.init_state_fn(self.optimizer)
        state_dict = self.state_dict()
        sharded_torch_state(state_dict, self.get_parameters(), model_sharded_state_dict)
        return state_dict


def drop_grads(params: Iterable[Tensor], set_to_none: bool = True) -> None:
    """Clear `.grad` of the parameters: to None, or to zeros in place."""
    for param in params:
        if param.grad is None:
            continue
        if set_to_none:
            param.grad = None
        else:
            param.grad.detach_().zero_()


def flatten(groups: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    """All tensors of a list of groups, in order."""
    return list(chain.from_iterable(groups))
