"""Memory by formula: weights, optimizer state and activations of the most loaded rank (spec: training, section 20.2)."""

from __future__ import annotations

import math
from argparse import Namespace

NUM_BYTES_IN_MEGABYTE = 1024 * 1024


def compute_weight_and_optimizer_memory(args: Namespace, verbose: bool = False) -> float:
    """Bytes of weights, gradients and optimizer state on the most loaded rank."""
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    hidden, layers = args.hidden_size, args.num_layers
    projection_ratio = args.kv_channels * args.num_attention_heads / hidden
    experts = 1 if args.num_experts is None else args.num_experts
    gated = 3 / 2 if args.swiglu else 1
    in_layers = (
        2
        * layers
        * hidden
        * hidden
        * (
            (1 + groups / args.num_attention_heads) * projection_ratio
            + (args.ffn_hidden_size / hidden) * experts * gated
            + 2 / hidden
            + 1 / (layers * hidden)
        )
    )
    embedding = hidden * args.padded_vocab_size
    untied = args.untie_embeddings_and_output_weights
    in_embeddings = 2 * embedding if untied else embedding
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    most_loaded = (in_layers / pp + embedding) / tp
    if untied and pp == 1:
        most_loaded += embedding / tp
    if verbose:
        billion = 10**9
        print(f"Number of parameters in transformer layers in billions:  {in_layers / billion:.2f}")
        print(f"Number of parameters in embedding layers in billions: {in_embeddings / billion:.2f}")
        print(f"Total number of parameters in billions: {(in_layers + in_embeddings) / billion:.2f}")
        print(f"Number of parameters in most loaded shard in billions: {most_loaded / billion:.4f}")
        if pp > 1:
            print(f"Number of parameters in other shards in billions: {in_layers / (pp * tp) / billion:.4f}")
    return most_loaded * (18 if not args.use_distributed_optimizer else 6 + 12 / args.data_parallel_size)


def compute_activation_memory(args: Namespace, num_microbatches: int | None, verbose: bool = False) -> float:
    """Bytes of activations on the first stage, with sequence parallelism and selective recomputation."""
    hidden = args.hidden_size
    tokens = args.seq_length * args.micro_batch_size
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    per_layer = tokens * hidden * (18 + 4 * (args.ffn_hidden_size / hidden))
    if verbose:
        print(
            f"Activation memory footprint per transformer layer: {per_layer / NUM_BYTES_IN_MEGABYTE / tp:.1f} MB"
        )
    total = per_layer * args.num_layers
    total += 8 * tokens * pp  # token and position ids
    total += tokens * hidden * pp  # dropout mask of the embedding
    in_flight: int | float = 1
    if args.virtual_pipeline_model_parallel_size is not None:
        penalty = 1 + (pp - 1) / (pp * args.virtual_pipeline_model_parallel_size)
        in_flight = math.ceil(penalty * pp)
        total *= penalty
        if verbose:
            print(f"Memory penalty from interleaved schedule: {penalty:.2f}")
            print(f"Number of in-flight microbatches: {in_flight}")
    elif pp > 1:
        in_flight = pp if num_microbatches is None else min(num_microbatches, pp)
        total *= in_flight / pp
        if verbose:
            print(f"Number of in-flight microbatches: {in_flight}")
    else:
        # Without a pipeline the rank also holds the input of the output layer and the fp32 logits.
        total += tokens * hidden * 4 * (1 + args.padded_vocab_size / hidden)
    return total / tp


def report_theoretical_memory(
    args: Namespace, num_microbatches: int | None = None, verbose: bool = False
) -> None:
    """Print the report; activations only where the formula holds."""
    weights = compute_weight_and_optimizer_memory(args, verbose=verbose) / NUM_BYTES_IN_MEGABYTE
    if not args.sequence_parallel or args.recompute_granularity != "selective":
        print(f"Theoretical memory footprints: weight and optimizer={weights:.2f} MB")
        return
    activation = compute_activation_memory(args, num_microbatches, verbose=verbose) / NUM_BYTES_IN_MEGABYTE
    print(
        f"Theoretical memory footprints: weight and optimizer={weights:.2f} MB, "
        f"activation={activation:.2f} MB, total={weights + activation:.2f} MB\n"
    )
