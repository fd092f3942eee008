"""Rules of commands that train: what the loop needs besides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron.core.flags import rule
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator
from megatron.training.config.rules.base import FROM_FILES, TRAINING
from megatron.training.config.rules.layout import layer_stages, stack_depth
from megatron.training.config.rules.run import data_sources


def batches_on_the_way(args: Any) -> Iterable[int]:
    """Samples of each step that a batch ramp-up takes, up to the first that would take none."""
    if args.rampup_batch_size is None or not args.train_samples:
        return
    start, increment, samples = map(int, args.rampup_batch_size)
    sizes = (args.global_batch_size, args.micro_batch_size, args.data_parallel_size)
    ramp = RampupBatchsizeNumMicroBatchesCalculator(
        *sizes, args.decrease_batch_size_if_needed, -1, start, increment, samples
    )
    consumed = 0
    while consumed <= min(samples, args.train_samples):
        ramp.update(consumed, consistency_check=False)
        batch = ramp.get_current_running_global_batch_size()
        yield batch
        if batch == 0:
            return
        consumed += batch


def in_whole_groups(args: Any, batch: int) -> bool:
    """Whether an interleaved pipeline has an order for a step of this many samples."""
    micro_batches = batch // (args.micro_batch_size * args.data_parallel_size)
    interleaved = (args.virtual_pipeline_model_parallel_size or 1) > 1
    return not interleaved or micro_batches % args.pipeline_model_parallel_size == 0


# fmt: off
@rule(TRAINING, "--train-iters", "--train-samples", bad="-train-iters", why="the length of training is not given",
      fix="give one of the two")
def training_has_a_length(args: Any) -> bool:
    return bool(args.train_iters or args.train_samples) or args.skip_train


@rule(TRAINING, "--train-iters", bad="--train-iters -5", why="{a.train_iters} steps cannot be taken",
      fix="give a positive number")
def steps_are_positive(args: Any) -> bool:
    return not args.train_iters or args.train_iters > 0


@rule(TRAINING, "--train-samples", bad="-train-iters --train-samples -5",
      why="{a.train_samples} samples cannot be trained on", fix="give a positive number")
def samples_are_positive(args: Any) -> bool:
    return not args.train_samples or args.train_samples > 0


@rule(TRAINING, "--output-bert-embeddings", "--bert-embedder-type", bad="--output-bert-embeddings",
      why="training computes losses, not embeddings", fix="drop them; tools/bert_embedding is what they are for")
def losses_are_computed(args: Any) -> bool:
    return not args.output_bert_embeddings and args.bert_embedder_type == "megatron"


@rule(TRAINING, "--lr", bad="-lr", why="the learning rate is not given", fix="give --lr")
def learning_rate_given(args: Any) -> bool:
    return args.lr is not None or args.skip_train


@rule(TRAINING, "--lr", bad="--lr=-1e-3 --min-lr=-1", why="a learning rate of {a.lr} climbs the loss", fix="give 0 or more")
def learning_rate_descends(args: Any) -> bool:
    return args.lr is None or args.lr >= 0


@rule(TRAINING, "--min-lr", bad="--min-lr=-1e-3", why="a learning rate of {a.min_lr} climbs the loss",
      fix="give 0 or more")
def smallest_learning_rate_descends(args: Any) -> bool:
    return args.min_lr >= 0


@rule(TRAINING, "--lr-warmup-init", "--lr", bad="--lr-warmup-init 1.0",
      why="warm-up would start at {a.lr_warmup_init}, above the peak {a.lr}", fix="lower --lr-warmup-init")
def warm_up_rises(args: Any) -> bool:
    return args.lr is None or 0 <= args.lr_warmup_init <= args.lr


@rule(TRAINING, "--lr-warmup-fraction", bad="--lr-warmup-fraction 1.5",
      why="{a.lr_warmup_fraction} is not a share of the decay", fix="give a value from 0 to 1, 1 excluded")
def warm_up_is_a_share(args: Any) -> bool:
    return args.lr_warmup_fraction is None or 0 <= args.lr_warmup_fraction < 1


@rule(TRAINING, "--lr-warmup-iters", "--lr-warmup-samples", bad="--lr-warmup-iters -1",
      why="no warm-up is shorter than none", fix="give 0 or more")
def warm_up_has_a_length(args: Any) -> bool:
    return args.lr_warmup_iters >= 0 and args.lr_warmup_samples >= 0


@rule(TRAINING, "--lr-decay-iters", "--lr-decay-samples", bad="--lr-decay-iters 0",
      why="the learning rate cannot decay in no time", fix="give 1 or more")
def decay_has_a_length(args: Any) -> bool:
    return all(length is None or length > 0 for length in (args.lr_decay_iters, args.lr_decay_samples))


@rule(TRAINING, "--lr-warmup-iters", "--lr-decay-iters", bad="--lr-warmup-iters 10",
      why="a warm-up of {a.lr_warmup_iters} steps leaves no step for the decay", fix="shorten the warm-up")
def warm_up_ends(args: Any) -> bool:
    steps = args.lr_decay_iters or args.train_iters
    return not (steps and args.train_iters) or args.lr_warmup_iters < steps


@rule(TRAINING, "--lr-warmup-samples", "--lr-decay-samples",
      bad="-train-iters --train-samples 100 --lr-warmup-samples 100",
      why="a warm-up of {a.lr_warmup_samples} samples leaves none for the decay", fix="shorten the warm-up")
def sample_warm_up_ends(args: Any) -> bool:
    samples = args.lr_decay_samples or args.train_samples
    return not (samples and args.train_samples) or args.lr_warmup_samples < samples


@rule(TRAINING, "--decoupled-lr", "--decoupled-min-lr", bad="--decoupled-lr 1e-4 --decoupled-min-lr 1e-3",
      why="the lower bound {a.decoupled_min_lr} is above the peak {a.decoupled_lr}", fix="lower --decoupled-min-lr")
def decoupled_learning_rate_is_above_its_bound(args: Any) -> bool:
    return args.decoupled_lr is None or 0 <= (args.decoupled_min_lr or 0) <= args.decoupled_lr


@rule(TRAINING, "--lr-decay-style", "--lr-wsd-decay-iters", bad="--lr-decay-style WSD",
      why="the length of the last phase of WSD is not given",
      fix="give --lr-wsd-decay-iters, or --lr-wsd-decay-samples where training is counted in samples")
def wsd_has_a_last_phase(args: Any) -> bool:
    phase = args.lr_wsd_decay_iters if args.train_iters else args.lr_wsd_decay_samples
    return args.lr_decay_style != "WSD" or phase is not None


@rule(TRAINING, "--global-batch-size", "--micro-batch-size",
      bad="--global-batch-size 9 --micro-batch-size 2",
      why="{a.global_batch_size} samples cannot be cut into micro batches of {a.micro_batch_size} on each of "
          "{a.data_parallel_size} replicas",
      fix="make it a multiple of micro batch x replicas, or add --decrease-batch-size-if-needed")
def micro_batches_divide_the_batch(args: Any) -> bool:
    if args.decrease_batch_size_if_needed:
        return args.global_batch_size >= args.micro_batch_size * args.data_parallel_size
    return args.global_batch_size % (args.micro_batch_size * args.data_parallel_size) == 0


@rule(TRAINING, "--num-layers-per-virtual-pipeline-stage", "--pipeline-model-parallel-size", "--global-batch-size",
      bad="--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 6",
      why="an interleaved pipeline takes its micro batches in groups of {a.pipeline_model_parallel_size}, one for each "
          "stage, and {a.global_batch_size} samples in micro batches of {a.micro_batch_size} on each of "
          "{a.data_parallel_size} replicas are no whole groups",
      fix="make the batch a multiple of micro batch x replicas x pipeline size, or drop "
          "--num-layers-per-virtual-pipeline-stage")
def interleaved_micro_batches_group(args: Any) -> bool:
    return in_whole_groups(args, args.global_batch_size)


@rule(TRAINING, "--rampup-batch-size", bad="-train-iters --train-samples 100 --rampup-batch-size 8 8",
      why="it takes three numbers: start, increment and samples", fix="give all three")
def ramp_up_has_three_numbers(args: Any) -> bool:
    ramp = args.rampup_batch_size
    return ramp is None or (len(ramp) == 3 and all(str(item).isdigit() for item in ramp))


@rule(TRAINING, "--rampup-batch-size", "--global-batch-size",
      bad="-train-iters --train-samples 100 --rampup-batch-size 8 5 50 --global-batch-size 16",
      why="steps of {a.rampup_batch_size[1]} do not lead from {a.rampup_batch_size[0]} to {a.global_batch_size}",
      fix="choose an increment that divides the difference")
def ramp_up_arrives(args: Any) -> bool:
    if args.rampup_batch_size is None:
        return True
    start, increment, samples = map(int, args.rampup_batch_size)
    rise = args.global_batch_size - start
    return start > 0 and increment > 0 and samples > 0 and rise > 0 and rise % increment == 0


@rule(TRAINING, "--rampup-batch-size", "--micro-batch-size",
      bad="-train-iters --train-samples 100 --rampup-batch-size 4 1 50 --global-batch-size 8",
      why="on the way there are batches that cannot be cut into micro batches of {a.micro_batch_size} on each of "
          "{a.data_parallel_size} replicas",
      fix="start from and rise by multiples of micro batch x replicas, or start from one at least and add "
          "--decrease-batch-size-if-needed")
def micro_batches_divide_the_ramp_up(args: Any) -> bool:
    unit = args.micro_batch_size * args.data_parallel_size
    return all(batch > 0 and batch % unit == 0 for batch in batches_on_the_way(args))


@rule(TRAINING, "--num-layers-per-virtual-pipeline-stage", "--pipeline-model-parallel-size", "--rampup-batch-size",
      bad="-train-iters --train-samples 100 --rampup-batch-size 4 2 50 --global-batch-size 8 "
          "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
      why="an interleaved pipeline takes its micro batches in groups of {a.pipeline_model_parallel_size}, one for each "
          "stage, and on the way there are batches that are no whole groups",
      fix="start from and rise by multiples of micro batch x replicas x pipeline size, or drop "
          "--num-layers-per-virtual-pipeline-stage")
def interleaved_micro_batches_group_on_the_way(args: Any) -> bool:
    return all(in_whole_groups(args, batch) for batch in batches_on_the_way(args))


@rule(FROM_FILES, "--mock-data", "--data-path", bad="-mock-data", why="there is nothing to train on",
      fix="give a dataset's prefix as --data-path, or try things out with --mock-data")
def data_given(args: Any) -> bool:
    return data_sources(args) == 1 or args.dataloader_type == "external"


@rule(TRAINING, "--num-layers", "--pipeline-model-parallel-size", bad="--num-layers 5 --pipeline-model-parallel-size 2",
      why="the layers cannot be divided evenly over the stages",
      fix="choose another number, or give --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers")
def layers_divide_over_stages(args: Any) -> bool:
    uneven = args.decoder_first_pipeline_num_layers is not None or args.decoder_last_pipeline_num_layers is not None
    return uneven or stack_depth(args) % layer_stages(args) == 0


@rule(TRAINING, "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers",
      "--pipeline-model-parallel-size",
      bad="--num-layers 6 --pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 1",
      why="what the first and last stage leave cannot be divided evenly over the other stages",
      fix="choose other numbers for the two stages")
def uneven_layers_divide(args: Any) -> bool:
    ends = [args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers]
    given = [layers for layers in ends if layers is not None]
    middle = args.pipeline_model_parallel_size - len(given)
    rest = stack_depth(args) - sum(given)
    return not given or (min(given) >= 0 and (rest == 0 if middle <= 0 else rest >= 0 and rest % middle == 0))


@rule(TRAINING, "--num-experts", "--tensor-model-parallel-size", "--sequence-parallel",
      bad="--num-experts 4 --moe-router-topk 2 --tensor-model-parallel-size 2",
      why="each tensor parallel rank must route tokens of its own to train experts", fix="add --sequence-parallel")
def training_experts_needs_own_tokens(args: Any) -> bool:
    return args.num_experts is None or args.tensor_model_parallel_size == 1 or args.sequence_parallel


@rule(TRAINING, "--moe-router-load-balancing-type", "--moe-aux-loss-coeff",
      bad="--num-experts 4 --moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0.01",
      why="sinkhorn balances by itself and takes no auxiliary loss",
      fix="leave the coefficient at 0, or choose aux_loss")
def balanced_once(args: Any) -> bool:
    sinkhorn = args.num_experts is not None and args.moe_router_load_balancing_type == "sinkhorn"
    return not (sinkhorn and args.moe_aux_loss_coeff)


@rule(TRAINING, "--moe-aux-loss-coeff", "--moe-z-loss-coeff", bad="--num-experts 4 --moe-aux-loss-coeff -0.01",
      why="a negative weight rewards what the loss term is to prevent", fix="give 0 or more")
def router_losses_are_losses(args: Any) -> bool:
    return args.moe_aux_loss_coeff >= 0 and (args.moe_z_loss_coeff or 0) >= 0


@rule(TRAINING, "--moe-input-jitter-eps", bad="--num-experts 4 --moe-input-jitter-eps -0.1",
      why="there is no noise between 1 - eps and 1 + eps for an eps of {a.moe_input_jitter_eps}", fix="give 0 or more")
def jitter_has_a_range(args: Any) -> bool:
    return (args.moe_input_jitter_eps or 0) >= 0


@rule(TRAINING, "--moe-use-upcycling", "--load", bad="--num-experts 2 --moe-use-upcycling --save ckpt --save-interval 1",
      why="there is no dense model to start from", fix="give its checkpoint as --load or --pretrained-checkpoint")
def upcycling_has_a_source(args: Any) -> bool:
    return not args.moe_use_upcycling or bool(args.load or args.pretrained_checkpoint)


@rule(TRAINING, "--moe-use-upcycling", "--moe-extended-tp",
      bad="--num-experts 2 --moe-use-upcycling --save ckpt --save-interval 1 --load dense --moe-extended-tp",
      why="a rank's piece of the dense MLP is no piece of an expert that is divided over more ranks",
      fix="drop --moe-extended-tp for the first run")
def upcycled_experts_are_divided_alike(args: Any) -> bool:
    return not (args.moe_use_upcycling and args.moe_extended_tp)


@rule(TRAINING, "--moe-router-topk", "--num-experts", bad="--num-experts 4 --moe-router-topk 5",
      why="each token is to be sent to {a.moe_router_topk} of {a.num_experts} experts",
      fix="choose a top-k between 1 and the number of experts")
def topk_is_within_experts(args: Any) -> bool:
    return args.num_experts is None or 1 <= args.moe_router_topk <= args.num_experts


@rule(TRAINING, "--moe-router-topk", "--moe-router-pre-softmax", bad="--num-experts 4 --moe-router-topk 1",
      why="a softmax over one expert is always 1, and the router learns nothing", fix="add --moe-router-pre-softmax")
def one_expert_is_weighed_against_the_others(args: Any) -> bool:
    weighs = args.moe_router_pre_softmax or args.moe_router_load_balancing_type == "sinkhorn"
    return args.num_experts is None or args.moe_router_topk > 1 or weighs


@rule(TRAINING, "--eval-interval", bad="--eval-interval 0", why="evaluations every {a.eval_interval} steps never come",
      fix="give 1 or more; --eval-iters 0 switches evaluation off")
def evaluation_interval_is_positive(args: Any) -> bool:
    return args.eval_interval is None or args.eval_interval > 0


@rule(TRAINING, "--eval-iters", bad="--eval-iters -1", why="{a.eval_iters} batches cannot be evaluated",
      fix="give 0 or more")
def evaluation_is_counted(args: Any) -> bool:
    return args.eval_iters >= 0


@rule(TRAINING, "--log-interval", bad="--log-interval 0", why="log lines every {a.log_interval} steps never come",
      fix="give 1 or more")
def log_interval_is_positive(args: Any) -> bool:
    return args.log_interval > 0


@rule(TRAINING, "--tensorboard-log-interval", bad="--tensorboard-log-interval 0",
      why="entries every {a.tensorboard_log_interval} steps never come", fix="give 1 or more")
def tensorboard_interval_is_positive(args: Any) -> bool:
    return args.tensorboard_log_interval > 0


@rule(TRAINING, "--exit-interval", bad="--exit-interval 0", why="no step is divisible by {a.exit_interval}",
      fix="give 1 or more")
def exit_interval_is_positive(args: Any) -> bool:
    return args.exit_interval is None or args.exit_interval > 0


@rule(TRAINING, "--check-weight-hash-across-dp-replicas-interval",
      bad="--check-weight-hash-across-dp-replicas-interval 0",
      why="checks every {a.check_weight_hash_across_dp_replicas_interval} steps never come", fix="give 1 or more")
def hash_interval_is_positive(args: Any) -> bool:
    interval = args.check_weight_hash_across_dp_replicas_interval
    return interval is None or interval > 0


@rule(TRAINING, "--manual-gc-interval", bad="--manual-gc --manual-gc-interval -1",
      why="{a.manual_gc_interval} is not a number of steps", fix="give 0 or more")
def collection_interval_counts(args: Any) -> bool:
    return not args.manual_gc or args.manual_gc_interval >= 0


@rule(TRAINING, "--seed", bad="--seed 0", why="seed {a.seed} is not positive", fix="give a positive seed")
def seed_is_positive(args: Any) -> bool:
    return args.seed > 0


@rule(TRAINING, "--init-method-std", bad="--init-method-std -0.1",
      why="a standard deviation of {a.init_method_std} does not exist", fix="give 0 or more")
def deviation_exists(args: Any) -> bool:
    return args.init_method_std >= 0


@rule(TRAINING, "--clip-grad", bad="--clip-grad -1", why="no gradient has a norm below {a.clip_grad}",
      fix="give a positive norm, or 0 for no clipping")
def clipping_norm_is_positive(args: Any) -> bool:
    return args.clip_grad >= 0


@rule(TRAINING, "--adam-beta1", "--adam-beta2", bad="--adam-beta2 1.0",
      why="running means need decays from 0 up to 1, 1 excluded", fix="give such values")
def adam_decays(args: Any) -> bool:
    return 0 <= args.adam_beta1 < 1 and 0 <= args.adam_beta2 < 1


@rule(TRAINING, "--adam-eps", bad="--adam-eps -1", why="a term of {a.adam_eps} may make the denominator zero",
      fix="give 0 or more")
def adam_term_is_positive(args: Any) -> bool:
    return args.adam_eps >= 0


@rule(TRAINING, "--sgd-momentum", bad="--optimizer sgd --sgd-momentum -0.1",
      why="a momentum of {a.sgd_momentum} is no share of the last step", fix="give a value from 0 up to 1, 1 excluded")
def momentum_is_a_share(args: Any) -> bool:
    return 0 <= args.sgd_momentum < 1


@rule(TRAINING, "--weight-decay", bad="--weight-decay -0.1", why="a decay of {a.weight_decay} makes weights grow",
      fix="give 0 or more")
def weights_decay(args: Any) -> bool:
    return args.weight_decay >= 0


@rule(TRAINING, "--wandb-project", "--wandb-exp-name", bad="--wandb-project p", why="the run needs a name",
      fix="give --wandb-exp-name")
def wandb_run_has_a_name(args: Any) -> bool:
    return not args.wandb_project or bool(args.wandb_exp_name)


@rule(TRAINING, "--use-pytorch-profiler", "--tensorboard-dir", bad="--profile --use-pytorch-profiler",
      why="the trace is written there", fix="give --tensorboard-dir")
def trace_has_a_place(args: Any) -> bool:
    return not (args.profile and args.use_pytorch_profiler) or args.tensorboard_dir is not None


@rule(TRAINING, "--profile-step-start", "--profile-step-end", bad="--profile --profile-step-start 5 --profile-step-end 5",
      why="no step lies between {a.profile_step_start} and {a.profile_step_end}", fix="end after the start")
def profile_has_steps(args: Any) -> bool:
    return not args.profile or args.profile_step_start < args.profile_step_end
