"""Time of one training step of a small GPT on the CPU: ours and HuggingFace's GPT-2 of the same shape,
interleaved.

    python benchmarks/model_step.py [--dtype bf16] [--dropout 0.1] [--threads 2] [--rounds 10]

Both run forward, loss, backward and torch's fused AdamW on the same tokens. Rounds alternate between the two,
so that load on the machine meets both alike; the median of each and their ratio are printed, and the rate of
a square matmul as a yardstick.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig


def ours(args: argparse.Namespace, dtype: torch.dtype) -> torch.nn.Module:
    """A tied GPT with the command line's default fusions."""
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        hidden_dropout=args.dropout,
        attention_dropout=args.dropout,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        masked_softmax_fusion=True,
        params_dtype=dtype,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        args.vocab,
        args.sequence,
        share_embeddings_and_output_weights=True,
    ).to(dtype)


def huggingface(args: argparse.Namespace, dtype: torch.dtype) -> torch.nn.Module:
    """GPT-2 of the same shape with SDPA attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=args.vocab,
        n_positions=args.sequence,
        n_embd=args.hidden,
        n_layer=args.layers,
        n_head=args.heads,
        resid_pdrop=args.dropout,
        embd_pdrop=args.dropout,
        attn_pdrop=args.dropout,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return GPT2LMHeadModel(config).to(dtype)


def stepper(model: torch.nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
    """One training step as a function."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        optimizer.step()

    return step


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a 1024^3 product."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    a @ b
    best = min(timed(lambda: a @ b) for _ in range(5))
    return 2 * 1024**3 / best / 1e9


def timed(run: Callable[[], object]) -> float:
    """Seconds one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Parse the options and print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("layers", 6), ("hidden", 320), ("heads", 5), ("sequence", 256), ("vocab", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print where our step spends its time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    get_cuda_rng_tracker().add("model-parallel-rng", 1)

    tokens = torch.randint(0, args.vocab, (args.batch, args.sequence))
    positions = torch.arange(args.sequence).expand_as(tokens)
    models = {"megatron": ours(args, dtype), "huggingface": huggingface(args, dtype)}
    mine, theirs = models["megatron"], models["huggingface"].train()
    steps = {
        "megatron": stepper(mine, lambda: mine(tokens, positions, None, labels=tokens).float().mean()),
        "huggingface": stepper(theirs, lambda: theirs(tokens, labels=tokens).loss),
    }
    for step in steps.values():
        step()
        step()
    if args.profile:
        with torch.profiler.profile() as profile:
            steps["megatron"]()
        print(
            profile.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45
            )
        )
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(timed(step) * 1000)
    for name, samples in times.items():
        print(f"{name:12s} median {statistics.median(samples):7.1f} ms   best {min(samples):7.1f} ms")
    ratio = statistics.median(times["huggingface"]) / statistics.median(times["megatron"])
    print(
        f"huggingface / megatron {ratio:.2f}   best / best {min(times['huggingface']) / min(times['megatron']):.2f}"
    )
    print(f"matmul 1024^3 {args.dtype}: {matmul_rate(dtype):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
