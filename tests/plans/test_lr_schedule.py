"""Learning-rate and weight-decay curves, and resuming them, against v0.9's recorded values."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.core.errors import ConfigError
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, learning_rate, weight_decay

GOLDEN = Path(__file__).parents[1] / "golden/training"
CURVES = json.loads((GOLDEN / "lr_schedule.json").read_text())["cases"]
LOADS = json.loads((GOLDEN / "scheduler_load.json").read_text())["cases"]


def _steps(args):
    """The step counts (in samples) that v0.9 derives; the training shell's own derivation is tested with it."""
    in_iters = args["train_iters"] is not None
    unit = args["global_batch_size"] if in_iters else 1
    kind = "iters" if in_iters else "samples"
    decay = (args[f"lr_decay_{kind}"] or args[f"train_{kind}"]) * unit
    fraction = args["lr_warmup_fraction"]
    wsd = args[f"lr_wsd_decay_{kind}"]
    return {
        "lr_decay_steps": decay,
        "wd_incr_steps": args[f"train_{kind}"] * unit,
        "wsd_decay_steps": None if wsd is None else wsd * unit,
        "lr_warmup_steps": args[f"lr_warmup_{kind}"] * unit if fraction is None else fraction * decay,
    }


def _scheduler(case):
    args = case["args"]
    return OptimizerParamScheduler(
        SimpleNamespace(param_groups=[dict(group) for group in case["groups"]]),
        init_lr=args["lr_warmup_init"],
        max_lr=args["lr"],
        min_lr=args["min_lr"],
        lr_decay_style=args["lr_decay_style"],
        start_wd=args["start_weight_decay"],
        end_wd=args["end_weight_decay"],
        wd_incr_style=args["weight_decay_incr_style"],
        use_checkpoint_opt_param_scheduler=args["use_checkpoint_opt_param_scheduler"],
        override_opt_param_scheduler=args["override_opt_param_scheduler"],
        lr_wsd_decay_style=args["lr_wsd_decay_style"],
        **_steps(args),
    )


@pytest.mark.parametrize("case", CURVES, ids=lambda case: case["name"])
def test_curve_is_v09s(case):
    if "error" in case:
        with pytest.raises(AssertionError) as caught:
            _scheduler(case)
        assert isinstance(caught.value, ConfigError) and "Fix:" in str(caught.value)
        return
    scheduler = _scheduler(case)
    for row in case["values"]:
        scheduler.num_steps = row["num_steps"]
        scheduler.step(0)
        groups = scheduler.optimizer.param_groups
        assert [group["lr"] for group in groups] == pytest.approx(row["lr"], rel=1e-12, abs=0)
        assert [group["weight_decay"] for group in groups] == pytest.approx(row["wd"], rel=1e-12, abs=0)
    assert scheduler.state_dict() == case["state_dict"]


def _resumed(case, **changes):
    group = {key: case["group_after"][key] for key in ("max_lr", "min_lr", "wd_mult", "lr_mult")}
    return OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        **{**case["init"], **changes},
        override_opt_param_scheduler=case["override"],
        use_checkpoint_opt_param_scheduler=case["use_checkpoint"],
    )


@pytest.mark.parametrize("case", [c for c in LOADS if "error" not in c], ids=lambda case: case["name"])
def test_loading_is_v09s(case):
    scheduler = _resumed(case)
    scheduler.load_state_dict(case["loaded"])
    assert scheduler.state_dict() == case["after"]
    (group,) = scheduler.optimizer.param_groups
    assert group == pytest.approx(case["group_after"], rel=1e-12)
    scheduler.step(0)
    assert group == pytest.approx(case["group_after_next_step0"], rel=1e-12)


@pytest.mark.parametrize("case", [c for c in LOADS if "error" in c], ids=lambda case: case["name"])
def test_contradictions_are_refused(case):
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[{}]),
        **case["init"],
        override_opt_param_scheduler=case["override"],
        use_checkpoint_opt_param_scheduler=case["use_checkpoint"],
    )
    with pytest.raises(AssertionError, match="--override-opt_param-scheduler"):
        scheduler.load_state_dict(case["loaded"])


def test_override_wins_over_the_groups_of_the_checkpoint():
    case = next(case for case in LOADS if case["name"] == "lr_differs_override")
    scheduler = _resumed(case)
    scheduler.optimizer.param_groups[0].update(max_lr=0.5, min_lr=0.25)  # as loading an optimizer does
    scheduler.load_state_dict(case["loaded"])
    assert scheduler.optimizer.param_groups[0] == pytest.approx(case["group_after"], rel=1e-12)


def test_a_constant_weight_decay_lets_the_run_grow_longer():
    case = LOADS[0]
    scheduler = _resumed(case, wd_incr_steps=case["init"]["wd_incr_steps"] * 2)
    scheduler.load_state_dict(case["loaded"])
    assert scheduler.wd_incr_steps == case["init"]["wd_incr_steps"] * 2
    rising = _resumed(case, wd_incr_style="linear", wd_incr_steps=1)
    with pytest.raises(AssertionError, match="wd_incr_steps"):
        rising.load_state_dict({**case["loaded"], "wd_incr_style": "linear"})


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_curves_stay_within_their_bounds(style):
    values = [
        learning_rate(
            n, init_lr=0.0, max_lr=1.0, min_lr=0.1, warmup_steps=10, decay_steps=100, style=style,
            wsd_decay_steps=30, wsd_style="exponential",
        )
        for n in range(130)
    ]  # fmt: skip
    assert values[:11] == pytest.approx([n / 10 for n in range(11)])
    assert all(0.1 <= value <= 1.0 for value in values[10:])
    assert all(a >= b for a, b in itertools.pairwise(values[10:])), "it never rises after warm-up"
    assert values[-1] == (1.0 if style == "constant" else 0.1)


def test_weight_decay_never_falls():
    for style in ("linear", "cosine"):
        curve = [weight_decay(n, start=0.1, end=0.3, incr_steps=50, style=style) for n in range(60)]
        assert curve[0] == pytest.approx(0.1) and curve[-1] == 0.3
        assert all(a <= b for a, b in itertools.pairwise(curve))
