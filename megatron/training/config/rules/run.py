"""Rules about batches, the length of training, data and checkpoints."""

from __future__ import annotations

from typing import Any

from megatron.core.flags import rule
from megatron.training.config.rules.base import GIVEN


def data_sources(args: Any) -> int:
    separate = any((args.train_data_path, args.valid_data_path, args.test_data_path))
    return sum((bool(args.mock_data), bool(args.data_path), separate))


# fmt: off
# ---- batches and length

@rule(GIVEN, "--micro-batch-size", bad="-micro-batch-size", why="the size of a micro batch is not given",
      fix="give --micro-batch-size")
def micro_batch_given(args: Any) -> bool:
    return args.micro_batch_size is not None


@rule(GIVEN, "--micro-batch-size", bad="--micro-batch-size 0", why="micro batches of {a.micro_batch_size} hold nothing",
      fix="give 1 or more")
def micro_batch_holds_samples(args: Any) -> bool:
    return args.micro_batch_size > 0


@rule(GIVEN, "--global-batch-size", bad="--global-batch-size 0",
      why="global batches of {a.global_batch_size} hold nothing", fix="give 1 or more")
def global_batch_holds_samples(args: Any) -> bool:
    return args.global_batch_size is None or args.global_batch_size > 0


@rule(GIVEN, "--train-iters", "--train-samples", bad="--train-samples 100", why="both give the length of training",
      fix="keep one of the two")
def length_of_training_given_once(args: Any) -> bool:
    return not (args.train_iters and args.train_samples)


@rule(GIVEN, "--train-iters", "--lr-decay-samples", bad="--lr-decay-samples 5",
      why="training is counted in steps, the decay in samples", fix="give --lr-decay-iters instead")
def steps_decay_in_steps(args: Any) -> bool:
    return not args.train_iters or args.lr_decay_samples is None


@rule(GIVEN, "--train-iters", "--lr-warmup-samples", bad="--lr-warmup-samples 5",
      why="training is counted in steps, the warm-up in samples", fix="give --lr-warmup-iters instead")
def steps_warm_up_in_steps(args: Any) -> bool:
    return not args.train_iters or args.lr_warmup_samples == 0


@rule(GIVEN, "--train-iters", "--rampup-batch-size", bad="--rampup-batch-size 8 8 100 --global-batch-size 16",
      why="the batch grows with samples, so training must be counted in them",
      fix="give --train-samples instead of --train-iters")
def ramp_up_needs_samples(args: Any) -> bool:
    return not args.train_iters or args.rampup_batch_size is None


@rule(GIVEN, "--lr-warmup-fraction", "--lr-warmup-iters", bad="--lr-warmup-fraction 0.1 --lr-warmup-iters 2",
      why="both give the length of the warm-up", fix="keep one of the two")
def warm_up_given_once(args: Any) -> bool:
    return not args.train_iters or args.lr_warmup_fraction is None or args.lr_warmup_iters == 0


@rule(GIVEN, "--train-samples", "--lr-decay-iters", bad="-train-iters --train-samples 100 --lr-decay-iters 5",
      why="training is counted in samples, the decay in steps", fix="give --lr-decay-samples instead")
def samples_decay_in_samples(args: Any) -> bool:
    return not args.train_samples or args.lr_decay_iters is None


@rule(GIVEN, "--train-samples", "--lr-warmup-iters", bad="-train-iters --train-samples 100 --lr-warmup-iters 5",
      why="training is counted in samples, the warm-up in steps", fix="give --lr-warmup-samples instead")
def samples_warm_up_in_samples(args: Any) -> bool:
    return not args.train_samples or args.lr_warmup_iters == 0


@rule(GIVEN, "--lr-warmup-fraction", "--lr-warmup-samples",
      bad="-train-iters --train-samples 100 --lr-warmup-fraction 0.1 --lr-warmup-samples 5",
      why="both give the length of the warm-up", fix="keep one of the two")
def sample_warm_up_given_once(args: Any) -> bool:
    return not args.train_samples or args.lr_warmup_fraction is None or args.lr_warmup_samples == 0


@rule(GIVEN, "--weight-decay-incr-style", "--start-weight-decay", "--end-weight-decay", bad="--start-weight-decay 0.1",
      why="a constant weight decay neither starts nor ends",
      fix="give --weight-decay alone, or --weight-decay-incr-style linear")
def constant_decay_has_no_ends(args: Any) -> bool:
    ends = (args.start_weight_decay, args.end_weight_decay)
    return args.weight_decay_incr_style != "constant" or ends == (None, None)


@rule(GIVEN, "--weight-decay-incr-style", "--start-weight-decay", "--end-weight-decay",
      bad="--weight-decay-incr-style linear",
      why="a weight decay that changes needs its first and last value", fix="give both")
def changing_decay_has_ends(args: Any) -> bool:
    ends = (args.start_weight_decay, args.end_weight_decay)
    return args.weight_decay_incr_style == "constant" or None not in ends


@rule(GIVEN, "--lr", "--min-lr", bad="--lr 1e-4 --min-lr 1e-3",
      why="the lower bound {a.min_lr} is above the peak {a.lr}", fix="lower --min-lr")
def learning_rate_is_above_its_bound(args: Any) -> bool:
    return args.lr is None or args.min_lr <= args.lr


# ---- data

@rule(GIVEN, "--mock-data", "--data-path", "--train-data-path", "--valid-data-path", "--test-data-path",
      bad="--mock-data --data-path a", why="data come from one place", fix="keep one of the sources")
def one_data_source(args: Any) -> bool:
    return data_sources(args) <= 1


@rule(GIVEN, "--num-dataset-builder-threads", bad="--num-dataset-builder-threads 0",
      why="{a.num_dataset_builder_threads} threads open nothing", fix="give 1 or more")
def builder_threads_exist(args: Any) -> bool:
    return args.num_dataset_builder_threads > 0


@rule(GIVEN, "--num-workers", bad="--num-workers -1", why="{a.num_workers} loader processes cannot be started",
      fix="give 0 or more")
def workers_count(args: Any) -> bool:
    return args.num_workers >= 0


@rule(GIVEN, "--mask-prob", bad="--mask-prob 1.5", why="{a.mask_prob} is not a probability",
      fix="give a value between 0 and 1")
def mask_probability(args: Any) -> bool:
    return 0 <= args.mask_prob <= 1


@rule(GIVEN, "--short-seq-prob", bad="--short-seq-prob -0.5", why="{a.short_seq_prob} is not a probability",
      fix="give a value between 0 and 1")
def short_sequence_probability(args: Any) -> bool:
    return 0 <= args.short_seq_prob <= 1


# ---- checkpoints

@rule(GIVEN, "--save", "--save-interval", bad="--save ckpt", why="when to save is not given", fix="give --save-interval")
def saving_has_an_interval(args: Any) -> bool:
    return args.save is None or args.save_interval is not None


@rule(GIVEN, "--save-interval", bad="--save ckpt --save-interval 0",
      why="checkpoints every {a.save_interval} steps never come", fix="give 1 or more")
def save_interval_is_positive(args: Any) -> bool:
    return args.save_interval is None or args.save_interval > 0


@rule(GIVEN, "--non-persistent-save-interval", bad="--non-persistent-save-interval 0",
      why="checkpoints every {a.non_persistent_save_interval} steps never come", fix="give 1 or more")
def non_persistent_interval_is_positive(args: Any) -> bool:
    return args.non_persistent_save_interval is None or args.non_persistent_save_interval > 0


@rule(GIVEN, "--non-persistent-ckpt-type", bad="--non-persistent-ckpt-type local",
      why="checkpoints of kind {a.non_persistent_ckpt_type} do not exist", fix="give global")
def non_persistent_checkpoints_are_global(args: Any) -> bool:
    return args.non_persistent_ckpt_type in (None, "global")


@rule(GIVEN, "--use-checkpoint-args", "--load", bad="--use-checkpoint-args",
      why="there is no checkpoint to take arguments from", fix="give --load")
def checkpoint_arguments_need_a_checkpoint(args: Any) -> bool:
    return not args.use_checkpoint_args or args.load is not None


@rule(GIVEN, "--ckpt-convert-format", "--ckpt-convert-save", "--load",
      bad="--ckpt-convert-format torch_dist --load ckpt",
      why="a conversion reads one directory and writes another", fix="give both --load and --ckpt-convert-save")
def conversion_has_both_ends(args: Any) -> bool:
    ends = args.load is not None and args.ckpt_convert_save is not None
    return args.ckpt_convert_format is None or ends


@rule(GIVEN, "--ckpt-convert-format", bad="--ckpt-convert-format zarr --load ckpt --ckpt-convert-save other",
      why="the zarr format is read, not written", fix="convert to torch_dist or torch")
def conversion_is_to_a_written_format(args: Any) -> bool:
    return args.ckpt_convert_format != "zarr"


@rule(GIVEN, "--ckpt-format", "--save", bad="--ckpt-format zarr --save ckpt --save-interval 1",
      why="the zarr format is read, not written", fix="give --ckpt-format torch_dist; --load finds its format out by itself")
def saved_format_is_written(args: Any) -> bool:
    return args.save is None or args.ckpt_format != "zarr"


@rule(GIVEN, "--async-save", "--ckpt-format", bad="--async-save --ckpt-format torch --save ckpt --save-interval 1",
      why="the torch format is written while training waits", fix="give --ckpt-format torch_dist, or drop --async-save")
def format_is_written_in_the_background(args: Any) -> bool:
    return args.save is None or not args.async_save or args.ckpt_format != "torch"


@rule(GIVEN, "--ckpt-step", "--load", bad="--ckpt-step 10", why="there is no directory to find this iteration in",
      fix="give --load")
def step_needs_a_checkpoint(args: Any) -> bool:
    return args.ckpt_step is None or args.load is not None


@rule(GIVEN, "--dist-ckpt-strictness", bad="--dist-ckpt-strictness return_all",
      why="{a.dist_ckpt_strictness} hands mismatched keys to a caller of the library, and the command line has none",
      fix="give log_all to see them, or raise_all to stop at them")
def mismatched_keys_have_a_taker(args: Any) -> bool:
    return not args.dist_ckpt_strictness.startswith("return")


@rule(GIVEN, "--keep-last", bad="--keep-last 0", why="keeping {a.keep_last_checkpoints} checkpoints would lose the run",
      fix="give 1 or more")
def one_checkpoint_stays(args: Any) -> bool:
    return args.keep_last_checkpoints is None or args.keep_last_checkpoints >= 1


@rule(GIVEN, "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler",
      bad="--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
      why="the schedule comes from the command line or from the checkpoint", fix="keep one of the two")
def one_schedule(args: Any) -> bool:
    return not (args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler)


@rule(GIVEN, "--mfu-peak-tflops", bad="--mfu-peak-tflops 0", why="nothing is a share of {a.mfu_peak_tflops}",
      fix="give the device's peak in TFLOP/s")
def peak_is_positive(args: Any) -> bool:
    return args.mfu_peak_tflops is None or args.mfu_peak_tflops > 0
