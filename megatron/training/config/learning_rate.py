"""Flags of the learning-rate and weight-decay schedules."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.flags import flag


@dataclass
class LearningRateConfig:
    """The curve the learning rate follows between --lr and --min-lr."""

    # fmt: off
    lr_decay_style: str = flag(
        "linear", choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"), group="learning rate",
        help="Shape of the decay; WSD is warm-up, stable, decay.")
    lr_wsd_decay_style: str = flag(
        "exponential", choices=("exponential", "linear", "cosine"), group="learning rate",
        needs="--lr-decay-style WSD", help="Shape of the last phase of WSD.")
    lr_decay_iters: int | None = flag(None, group="learning rate", help="Steps until --min-lr; default --train-iters.")
    lr_decay_samples: int | None = flag(
        None, group="learning rate", help="Samples until --min-lr; default --train-samples.")
    lr_wsd_decay_samples: int | None = flag(
        None, group="learning rate",
        needs=("--lr-decay-style WSD", "--train-samples"), help="Samples in the last phase of WSD.")
    lr_wsd_decay_iters: int | None = flag(
        None, group="learning rate",
        needs="--lr-decay-style WSD", unless="--train-samples", help="Steps in the last phase of WSD.")
    lr_warmup_fraction: float | None = flag(
        None, group="learning rate", help="Warm-up as a share of the decay length, instead of steps or samples.")
    lr_warmup_iters: int = flag(0, group="learning rate", help="Steps of linear warm-up.")
    lr_warmup_samples: int = flag(0, group="learning rate", help="Samples of linear warm-up.")
    lr_warmup_init: float = flag(0.0, group="learning rate",
        needs="--lr-warmup-iters or --lr-warmup-samples or --lr-warmup-fraction",
        help="Learning rate at which warm-up starts.")
    warmup: int | None = flag(
        None, group="learning rate", status="unsupported", reason="it was renamed", instead="--lr-warmup-fraction",
        help="Old name of --lr-warmup-fraction, as a percentage.")
    override_opt_param_scheduler: bool = flag(
        False, on="--override-opt_param-scheduler", group="learning rate",
        needs="--load",
        help="Take the schedule from the command line, whatever the checkpoint holds.")
    use_checkpoint_opt_param_scheduler: bool = flag(
        False, on="--use-checkpoint-opt_param-scheduler", group="learning rate",
        needs="--load",
        help="Take the schedule from the checkpoint, whatever the command line says.")
    # fmt: on


@dataclass
class WeightDecayConfig:
    """Weight decay that changes during training."""

    # fmt: off
    start_weight_decay: float | None = flag(None, group="regularization", help="Weight decay at the first step.")
    end_weight_decay: float | None = flag(None, group="regularization", help="Weight decay at the last step.")
    weight_decay_incr_style: str = flag(
        "constant", choices=("constant", "linear", "cosine"), group="regularization",
        help="How weight decay goes from --start-weight-decay to --end-weight-decay.")
    # fmt: on
