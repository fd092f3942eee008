"""AdamW with one step count per group: the update rule, its state, and results that do not depend on the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron.core.kernels.registry import Spec, select
from megatron.core.optimizer.untraced import Untraced

_VECTOR_BYTES = 64
"""The widest vector of a CPU; torch's fused kernel treats what is left at the end of a tensor with other roundings."""


class Adam(Untraced):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101) and bias correction.

    The state is the one of the fused optimizers that GPU checkpoints were written with: `exp_avg` and `exp_avg_sq` per
    parameter, the step count an int in the group. States with a `step` tensor per parameter (torch.optim.AdamW) load
    too. Gradients have the dtype of their parameters. The arithmetic is the kernel table's `adam`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": True,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self._kernels: dict[tuple[str, torch.dtype], Callable[..., None]] = {}

    def init_state(self) -> None:
        """Allocate the moments (zeros) of every parameter that has none yet."""
        for group in self.param_groups:
            for param in group["params"]:
                self._moments(param)

    def _moments(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Groups without one still count, so that all ranks agree."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            alike: dict[tuple[torch.device, torch.dtype], list[list[Tensor]]] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self._moments(param)
                columns = alike.setdefault((param.device, param.dtype), [[], [], [], []])
                for column, tensor in zip(
                    columns, (param.detach(), param.grad, state["exp_avg"], state["exp_avg_sq"])
                ):
                    column.append(tensor)
            for (device, dtype), columns in alike.items():
                self._update(device, dtype, columns, group)
        return loss

    def _update(
        self, device: torch.device, dtype: torch.dtype, columns: list[list[Tensor]], group: dict[str, Any]
    ) -> None:
        """Run the kernel on parameters, gradients and moments (`columns`) of one device and dtype."""
        kernel = self._kernels.get((device.type, dtype))
        if kernel is None:
            kernel = self._kernels[device.type, dtype] = select("adam", Spec(device.type, dtype))
        tails = _TailPack(columns, _VECTOR_BYTES // dtype.itemsize) if device.type == "cpu" else None
        kernel(
            *(columns if tails is None else tails.columns),
            step=group["step"],
            lr=group["lr"],
            betas=tuple(group["betas"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            bias_correction=group["bias_correction"],
        )
        if tails is not None:
            tails.write_back()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does; a per-parameter `step` becomes the group's."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for param in group["params"]:
                step = self.state.get(param, {}).pop("step", None)
                if step is not None:
                    group["step"] = int(step)


class _TailPack:
    """The ends of tensors that do not fill a vector, gathered and padded so that they are updated like all the rest.

    An element's update must not depend on where its tensor was cut, or a sharded run would differ from an unsharded one
    in the last bit. Where every tensor fills whole vectors (the usual case) nothing is copied.
    """

    def __init__(self, columns: list[list[Tensor]], width: int) -> None:
        self.columns = columns
        self._tails: list[list[Tensor]] = []
        self._packed: list[list[Tensor]] = []
        odd = [tensor.numel() % width != 0 for tensor in columns[0]]
        if not any(odd):
            return
        self.columns = []
        for column in columns:
            whole = [tensor for tensor, is_odd in zip(column, odd) if not is_odd]
            flat = [tensor.view(-1) for tensor, is_odd in zip(column, odd) if is_odd]
            cuts = [tensor.numel() - tensor.numel() % width for tensor in flat]
            tails = [tensor[cut:] for tensor, cut in zip(flat, cuts)]
            rows = column[0].new_zeros(len(flat), width)
            packed = [row[: tail.numel()] for row, tail in zip(rows, tails)]
            torch._foreach_copy_(packed, tails)
            bodies = [tensor[:cut] for tensor, cut in zip(flat, cuts) if cut]
            self.columns.append([*whole, *bodies, rows.view(-1)])
            self._tails.append(tails)
            self._packed.append(packed)

    def write_back(self) -> None:
        """Return the updated ends to parameters and moments; gradients did not change."""
        for position, (tails, packed) in enumerate(zip(self._tails, self._packed)):
            if position != 1:
                torch._foreach_copy_(tails, packed)
