"""The factor by which an fp16 loss is multiplied so that small gradients do not vanish: constant or adaptive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from megatron.core import device
from megatron.core.errors import InvariantError


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise InvariantError(name, f"{value} is not positive", "give a positive value")


class MegatronGradScaler(ABC):
    """A loss scale, kept as an fp32 tensor of one element so that it can be used without waiting for the device."""

    def __init__(self, initial_scale: float) -> None:
        _positive("loss scale", initial_scale)
        self._scale = torch.tensor([initial_scale], dtype=torch.float32, device=device.current())

    @property
    def scale(self) -> torch.Tensor:
        """The factor, [1] fp32."""
        return self._scale

    @property
    def inv_scale(self) -> torch.Tensor:
        """Its reciprocal, [1] fp32, taken in float64 and rounded once."""
        return self._scale.double().reciprocal().float()

    @abstractmethod
    def update(self, found_inf: bool) -> None:
        """React to a step whose gradients did (True) or did not overflow."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""


class ConstantGradScaler(MegatronGradScaler):
    """A scale that never changes; overflowing steps are skipped all the same."""

    def update(self, found_inf: bool) -> None:
        """Keep the scale."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the scale comes from the command line."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep the scale of the command line."""


class DynamicGradScaler(MegatronGradScaler):
    """A scale that shrinks after overflows and grows after `growth_interval` good steps in a row.

    `hysteresis` overflows are tolerated before the first reduction; after it every further one reduces at once, until
    the next growth refills the tolerance (v0.9's rule, kept for bitwise resume). A fractional interval is never hit
    exactly, so it never grows.
    """

    def __init__(
        self,
        initial_scale: float,
        min_scale: float,
        growth_factor: float,
        backoff_factor: float,
        growth_interval: float,
        hysteresis: int,
    ) -> None:
        super().__init__(initial_scale)
        _positive("--min-loss-scale", min_scale)
        if min_scale > initial_scale:
            raise InvariantError(
                "--initial-loss-scale --min-loss-scale",
                f"the first scale {initial_scale} lies below the smallest {min_scale}",
                "raise --initial-loss-scale",
            )
        if not growth_factor > 1.0:
            raise InvariantError("loss-scale growth", f"the factor {growth_factor} does not grow", "use 2")
        if not 0.0 < backoff_factor < 1.0:
            raise InvariantError(
                "loss-scale back-off", f"the factor {backoff_factor} does not shrink", "use 0.5"
            )
        _positive("--loss-scale-window", growth_interval)
        _positive("--hysteresis", hysteresis)
        self.min_scale = torch.tensor([min_scale], dtype=torch.float32, device=self._scale.device)
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.hysteresis = hysteresis
        self._growth_tracker = 0
        self._hysteresis_tracker = hysteresis

    def update(self, found_inf: bool) -> None:
        """Shrink after an overflow once the tolerance is used up; grow after enough good steps."""
        if found_inf:
            self._growth_tracker = 0
            self._hysteresis_tracker -= 1
            if self._hysteresis_tracker <= 0:
                self._scale = torch.max(self._scale * self.backoff_factor, self.min_scale)
            return
        self._growth_tracker += 1
        if self._growth_tracker == self.growth_interval:
            self._growth_tracker = 0
            self._hysteresis_tracker = self.hysteresis
            self._scale = self._scale * self.growth_factor

    def state_dict(self) -> dict[str, Any]:
        """Scale and counters."""
        return {
            "scale": self._scale,
            "growth_tracker": self._growth_tracker,
            "hysteresis_tracker": self._hysteresis_tracker,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue with a checkpoint's scale and counters."""
        self._scale = state_dict["scale"].to(self._scale.device, copy=True)
        self._growth_tracker = state_dict["growth_tracker"]
        self._hysteresis_tracker = state_dict["hysteresis_tracker"]
