"""Learning rate and weight decay as functions of the samples consumed, and the small state that remembers how many."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Protocol

from megatron.core.errors import ConfigError, InvariantError
from megatron.core.utils import log_single_rank

_LR_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
_WSD_STYLES = ("linear", "cosine", "exponential")
_WD_STYLES = ("constant", "linear", "cosine")

# Names under which earlier releases stored a field, newest first.
_OLD_NAMES = {
    "max_lr": ("start_lr",),
    "lr_warmup_steps": ("warmup_iter", "warmup_steps"),
    "lr_decay_steps": ("end_iter", "decay_steps"),
    "lr_decay_style": ("decay_style",),
    "num_steps": ("num_iters",),
}


class _HasParamGroups(Protocol):
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


def decay_coefficient(style: str, progress: float) -> float:
    """How much of the way down is left (1 = all, 0 = none) after the fraction `progress` of the decay.

    `exponential` halves steadily and is shifted to end at 0 (Hu et al. 2024, arXiv:2404.06395, use it to end WSD runs).
    """
    if style == "linear":
        return 1.0 - progress
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * progress) + 1.0)
    if style == "exponential":
        return 2.0 * math.pow(0.5, progress) - 1.0
    raise ConfigError("learning-rate decay", f"the style {style!r} is unknown", f"use one of {_WSD_STYLES}")


def learning_rate(
    num_steps: float,
    *,
    init_lr: float,
    max_lr: float,
    min_lr: float,
    warmup_steps: float,
    decay_steps: float,
    style: str,
    wsd_decay_steps: float | None = None,
    wsd_style: str | None = None,
) -> float:
    """The learning rate after `num_steps` samples: linear warm-up from `init_lr`, then the decay called `style`.

    All step counts are in samples; `warmup_steps` may be fractional. Past `decay_steps` the rate stays at `min_lr`,
    except with `constant`, which never decays. `WSD` (warm-up, stable, decay) decays by `wsd_style` during the last
    `wsd_decay_steps`.
    """
    if warmup_steps > 0 and num_steps <= warmup_steps:
        return init_lr + (max_lr - init_lr) * num_steps / warmup_steps
    if style == "constant":
        return max_lr
    if num_steps > decay_steps:
        return min_lr
    if style == "inverse-square-root":
        return max(min_lr, max_lr * max(warmup_steps, 1) ** 0.5 / max(num_steps, 1) ** 0.5)
    if style == "WSD":
        assert wsd_decay_steps is not None and wsd_style is not None, (
            "WSD needs the length and style of its decay"
        )
        stable_until = decay_steps - wsd_decay_steps
        left = 1.0
        if num_steps > stable_until:
            left = decay_coefficient(wsd_style, (num_steps - stable_until) / wsd_decay_steps)
    else:
        left = decay_coefficient(style, (num_steps - warmup_steps) / (decay_steps - warmup_steps))
    return min_lr + left * (max_lr - min_lr)


def weight_decay(num_steps: float, *, start: float, end: float, incr_steps: float, style: str) -> float:
    """The weight decay after `num_steps` samples, rising from `start` to `end` over `incr_steps` samples."""
    if style == "constant" or num_steps > incr_steps:
        return end
    progress = num_steps / incr_steps
    if style == "linear":
        return start + progress * (end - start)
    if style == "cosine":
        return start + 0.5 * (math.cos(math.pi * (1 - progress)) + 1.0) * (end - start)
    raise ConfigError("--weight-decay-incr-style", f"{style!r} is unknown", f"use one of {_WD_STYLES}")


class OptimizerParamScheduler:
    """Writes `lr` and `weight_decay` into an optimizer's parameter groups as samples are consumed.

    A group may carry `max_lr` and `min_lr` (otherwise the scheduler's hold) and the factors `lr_mult` and `wd_mult`.
    `step(increment)` is called after each update that succeeded, with the samples it consumed, so iteration k runs with
    the rate that belongs to iterations 1..k-1. Raises ConfigError for settings that contradict each other.
    """

    def __init__(
        self,
        optimizer: _HasParamGroups,
        init_lr: float,
        max_lr: float,
        min_lr: float,
        lr_warmup_steps: float,
        lr_decay_steps: int,
        lr_decay_style: str,
        start_wd: float,
        end_wd: float,
        wd_incr_steps: int,
        wd_incr_style: str,
        use_checkpoint_opt_param_scheduler: bool | None = True,
        override_opt_param_scheduler: bool | None = False,
        wsd_decay_steps: int | None = None,
        lr_wsd_decay_style: str | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.init_lr = init_lr
        self.max_lr = max_lr
        self.min_lr = min_lr
        self.lr_warmup_steps = lr_warmup_steps
        self.lr_decay_steps = lr_decay_steps
        self.lr_decay_style = lr_decay_style
        self.wsd_decay_steps = wsd_decay_steps
        self.lr_wsd_decay_style = lr_wsd_decay_style
        self.start_wd = start_wd
        self.end_wd = end_wd
        self.wd_incr_steps = wd_incr_steps
        self.wd_incr_style = wd_incr_style
        self.use_checkpoint_opt_param_scheduler = bool(use_checkpoint_opt_param_scheduler)
        self.override_opt_param_scheduler = bool(override_opt_param_scheduler)
        self.num_steps = 0
        self._check()
        # Loading an optimizer restores the groups of the saved run; an override must win over them.
        self._configured_bounds: list[dict[str, Any]] = [
            {key: group[key] for key in ("max_lr", "min_lr") if key in group}
            for group in optimizer.param_groups
        ]
        self.step(0)

    def _check(self) -> None:
        """Raise ConfigError unless the settings can be followed."""
        if self.max_lr is None:
            raise InvariantError("--lr", "no learning rate is given", "add --lr")
        if not 0.0 <= self.min_lr <= self.max_lr:
            raise InvariantError(
                "--lr --min-lr",
                f"the smallest rate {self.min_lr} does not lie between 0 and the peak rate {self.max_lr}",
                "lower --min-lr or raise --lr",
            )
        if self.init_lr > self.max_lr:
            raise InvariantError(
                "--lr-warmup-init",
                f"warm-up would begin at {self.init_lr}, above the peak rate {self.max_lr}",
                "choose a value below --lr",
            )
        if self.lr_decay_style not in _LR_STYLES:
            raise InvariantError(
                "--lr-decay-style", f"{self.lr_decay_style!r} is unknown", f"use one of {_LR_STYLES}"
            )
        if self.lr_decay_steps <= 0:
            raise InvariantError(
                "--lr-decay-iters",
                f"the decay would last {self.lr_decay_steps} samples",
                "give a positive --lr-decay-iters or --lr-decay-samples",
            )
        if self.lr_warmup_steps >= self.lr_decay_steps:
            raise InvariantError(
                "--lr-warmup-iters",
                f"warm-up ({self.lr_warmup_steps} samples) is not shorter than the whole schedule "
                f"({self.lr_decay_steps} samples)",
                "shorten the warm-up, or lengthen the run or --lr-decay-iters",
            )
        if self.lr_decay_style == "WSD":
            if self.wsd_decay_steps is None:
                raise InvariantError(
                    "--lr-decay-style WSD",
                    "the length of the final decay is not given",
                    "add --lr-wsd-decay-iters or --lr-wsd-decay-samples",
                )
            if self.lr_wsd_decay_style not in _WSD_STYLES:
                raise InvariantError(
                    "--lr-wsd-decay-style",
                    f"{self.lr_wsd_decay_style!r} is unknown",
                    f"use one of {_WSD_STYLES}",
                )
        if not 0.0 <= self.start_wd <= self.end_wd:
            raise InvariantError(
                "--start-weight-decay --end-weight-decay",
                f"weight decay would go from {self.start_wd} to {self.end_wd}, but may only rise from 0 or more",
                "swap the two values",
            )
        if self.wd_incr_style not in _WD_STYLES:
            raise InvariantError(
                "--weight-decay-incr-style", f"{self.wd_incr_style!r} is unknown", f"use one of {_WD_STYLES}"
            )
        if self.wd_incr_style == "constant" and self.start_wd != self.end_wd:
            raise InvariantError(
                "--weight-decay-incr-style constant",
                f"the start ({self.start_wd}) and end ({self.end_wd}) of a constant weight decay differ",
                "choose linear or cosine, or make them equal",
            )
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise InvariantError(
                "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
                "the first ignores the checkpoint's schedule, the second demands it",
                "keep one of them",
            )

    def get_wd(self) -> float:
        """Weight decay at the current number of samples, before a group's `wd_mult`."""
        return weight_decay(
            self.num_steps,
            start=self.start_wd,
            end=self.end_wd,
            incr_steps=self.wd_incr_steps,
            style=self.wd_incr_style,
        )

    def get_lr(self, param_group: Mapping[str, Any]) -> float:
        """Learning rate of a group at the current number of samples, before its `lr_mult`."""
        return learning_rate(
            self.num_steps,
            init_lr=self.init_lr,
            max_lr=self.max_lr if param_group.get("max_lr") is None else param_group["max_lr"],
            min_lr=self.min_lr if param_group.get("min_lr") is None else param_group["min_lr"],
            warmup_steps=self.lr_warmup_steps,
            decay_steps=self.lr_decay_steps,
            style=self.lr_decay_style,
            wsd_decay_steps=self.wsd_decay_steps,
            wsd_style=self.lr_wsd_decay_style,
        )

    def step(self, increment: int) -> None:
        """Count `increment` more samples and set every group's learning rate and weight decay."""
        self.num_steps += increment
        wd = self.get_wd()
        for group in self.optimizer.param_groups:
            group["lr"] = self.get_lr(group) * group.get("lr_mult", 1.0)
            group["weight_decay"] = wd * group.get("wd_mult", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores; counts are in samples. WSD's settings and the first rate are not part of it."""
        return {
            "max_lr": self.max_lr,
            "lr_warmup_steps": self.lr_warmup_steps,
            "num_steps": self.num_steps,
            "lr_decay_style": self.lr_decay_style,
            "lr_decay_steps": self.lr_decay_steps,
            "min_lr": self.min_lr,
            "start_wd": self.start_wd,
            "end_wd": self.end_wd,
            "wd_incr_style": self.wd_incr_style,
            "wd_incr_steps": self.wd_incr_steps,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the schedule of a checkpoint, whose values must equal this run's unless a flag says which win.

        `override` keeps this run's values, also in the groups whose `max_lr` and `min_lr` came back with the optimizer;
        `use_checkpoint` takes the checkpoint's. Names of earlier releases are understood. Weight-decay settings are
        taken over after the groups were set, so they act from the next step on. Raises ConfigError on a difference.
        """
        for name in ("max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style"):
            setattr(self, name, self._choose(name, _stored(state_dict, name)))
        if self.override_opt_param_scheduler:
            for group, bounds in zip(self.optimizer.param_groups, self._configured_bounds):
                group.update(bounds)
        self.step(increment=_stored(state_dict, "num_steps"))
        if "start_wd" in state_dict:
            self.start_wd = self._choose("start_wd", state_dict["start_wd"])
            self.end_wd = self._choose("end_wd", state_dict["end_wd"])
            # How fast a constant rises means nothing, so a run may be lengthened without an override.
            if not self.wd_incr_style == state_dict["wd_incr_style"] == "constant":
                self.wd_incr_steps = self._choose("wd_incr_steps", state_dict["wd_incr_steps"])
                self.wd_incr_style = self._choose("wd_incr_style", state_dict["wd_incr_style"])

    def _choose(self, name: str, stored: Any) -> Any:
        """The value of a setting after loading: this run's, the checkpoint's, or an error where they differ."""
        own = getattr(self, name)
        if own == stored:
            return own
        if self.override_opt_param_scheduler:
            self._log(f"keeping this run's {name} = {own}; the checkpoint holds {stored}")
            return own
        if not self.use_checkpoint_opt_param_scheduler:
            raise InvariantError(
                f"schedule setting {name}",
                f"this run asks for {own}, the checkpoint holds {stored}",
                "repeat the checkpoint's value, or add --override-opt_param-scheduler to keep this run's "
                "or --use-checkpoint-opt_param-scheduler to take the checkpoint's",
            )
        self._log(f"taking {name} = {stored} from the checkpoint; this run asks for {own}")
        return stored

    @staticmethod
    def _log(message: str) -> None:
        log_single_rank(logging.getLogger(__name__), logging.INFO, message)


def _stored(state_dict: Mapping[str, Any], name: str) -> Any:
    """A field of a checkpoint's schedule, whatever release wrote it."""
    for key in (*_OLD_NAMES.get(name, ()), name):
        if key in state_dict:
            return state_dict[key]
    raise ConfigError(
        f"schedule setting {name}",
        f"the checkpoint's schedule lacks it; it holds {sorted(state_dict)}",
        "load with --no-load-optim or --finetune to start a new schedule",
    )
