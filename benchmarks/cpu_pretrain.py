#!/usr/bin/env python3
"""Training speed on the CPU: the real training loop beside its bare model and HuggingFace's GPT-2, in one run.

    python benchmarks/cpu_pretrain.py                          # every case; figures into benchmarks/results and docs
    python benchmarks/cpu_pretrain.py --case 10M-fp32 --profile
    python benchmarks/cpu_pretrain.py --threads 1              # on a busy machine: compare CPU seconds, not wall time

Contenders take turns within each round, so that load on the machine meets all alike:

loop         `pretrain()` as a user runs it, logging every iteration: time from one forward step to the next
bare         the same modules without framework: forward, loss, backward, clip, torch's fused AdamW (in bf16 on fp32 copies)
huggingface  transformers' GPT2LMHeadModel of the same shape (sdpa), clip, the same AdamW; bf16 under autocast
half         the same with parameters and Adam's moments in bf16, which halves the optimizer's work and loses small updates
matmul       a 1024^3 product: the yardstick for the share of the machine's rate

Each figure is the median of --rounds; the cost of the framework is that of loop / bare within a round. With one thread the
CPU time of the process is compared, which load of others hardly changes; with more threads wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.surroundings import processor

ROOT = Path(__file__).resolve().parents[1]
CLIP = 1.0


@dataclass(frozen=True)
class Case:
    """What is trained."""

    layers: int
    hidden: int
    heads: int
    seq: int
    vocab: int
    micro_batch: int
    bf16: bool = False
    dropout: float = 0.0

    def command(self, iterations: int, folder: str) -> list[str]:
        """The command line of `pretrain_gpt.py`."""
        flags = {
            "num-layers": self.layers, "hidden-size": self.hidden, "num-attention-heads": self.heads,
            "seq-length": self.seq, "max-position-embeddings": self.seq, "micro-batch-size": self.micro_batch,
            "global-batch-size": self.micro_batch, "train-iters": iterations, "lr": 1e-4, "lr-decay-style": "constant",
            "tokenizer-type": "NullTokenizer", "vocab-size": self.vocab - 1, "eval-iters": 0, "eval-interval": 1000,
            "log-interval": 1, "num-workers": 0, "clip-grad": CLIP, "attention-dropout": self.dropout,
            "hidden-dropout": self.dropout, "metrics-file": f"{folder}/metrics.jsonl",
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return ["pretrain_gpt.py", *words, "--mock-data", *(["--bf16"] if self.bf16 else [])]


SMALL = Case(layers=6, hidden=320, heads=5, seq=256, vocab=8192, micro_batch=4)
LARGE = Case(layers=12, hidden=768, heads=12, seq=512, vocab=16384, micro_batch=2)


def with_options(case: Case, **options: Any) -> Case:
    """A variant of a case."""
    return Case(**(asdict(case) | options))


CASES = {
    "10M-fp32": SMALL,
    "10M-fp32-dropout": with_options(SMALL, dropout=0.1),
    "10M-bf16": with_options(SMALL, bf16=True),
    "10M-bf16-dropout": with_options(SMALL, bf16=True, dropout=0.1),
    "100M-fp32": LARGE,
    "100M-bf16": with_options(LARGE, bf16=True),
}

#: Milliseconds that Megatron-LM core_v0.9.0, brought to run on a CPU, takes on a quiet machine of two cores where the
#: 1024^3 product runs at this many GFLOP/s.
V09 = {"10M-fp32": (507.0, 193.0), "10M-fp32-dropout": (550.0, 193.0), "10M-bf16": (210.0, 352.0)}

Step = Callable[[], None]


def clock() -> float:
    """Seconds: CPU time of the process when it has one thread, else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def updating(model: torch.nn.Module, loss: Callable[[], Tensor], copies: bool) -> Step:
    """One training step: forward, backward, clip, AdamW; with `copies` on fp32 copies of the parameters."""
    params = list(model.parameters())
    mains = [p.detach().float().requires_grad_() for p in params] if copies else params
    optimizer = torch.optim.AdamW(mains, lr=1e-4, weight_decay=0.01, fused=True)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()
        if copies:
            for main, param in zip(mains, params):
                assert param.grad is not None, "every parameter has a gradient"
                main.grad = param.grad.float()
        torch.nn.utils.clip_grad_norm_(mains, CLIP, foreach=True)
        optimizer.step()
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(params, mains)

    return step


def bare(case: Case, tokens: Tensor) -> Step:
    """The model of the entry script, trained by hand."""
    import pretrain_gpt

    model: Any = pretrain_gpt.model_provider()
    model = model.bfloat16() if case.bf16 else model
    positions = torch.arange(case.seq).expand_as(tokens)
    return updating(model, lambda: model(tokens, positions, None, labels=tokens).float().mean(), case.bf16)


def huggingface(case: Case, tokens: Tensor, half: bool) -> Step:
    """GPT-2 of the same shape; `half` puts parameters and moments in bf16, otherwise bf16 is autocast's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=case.vocab, n_positions=case.seq, n_embd=case.hidden, n_layer=case.layers, n_head=case.heads,
            resid_pdrop=case.dropout, embd_pdrop=case.dropout, attn_pdrop=case.dropout,
            activation_function="gelu_pytorch_tanh", attn_implementation="sdpa", use_cache=False,
        )
    ).train()  # fmt: skip
    if half:
        model = model.bfloat16()
    autocast = case.bf16 and not half

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            return model(tokens, labels=tokens).loss

    return updating(model, loss, copies=False)


def matmul(case: Case) -> Step:
    """The yardstick, 1024^3."""
    a, b = torch.randn(2, 1024, 1024).to(torch.bfloat16 if case.bf16 else torch.float32)
    return lambda: [a @ b for _ in range(3)].clear()


class Rounds:
    """A forward step for `pretrain` that closes the loop's interval, lets the others run, and opens the next."""

    def __init__(self, case: Case, warmup: int, profile: bool) -> None:
        self.case, self.warmup, self.profile = case, warmup, profile
        self.steps: dict[str, Step] = {}
        self.times: dict[str, list[float]] = {}
        self.opened: float | None = None
        self.entered = 0

    def forward_step(self, iterator: Iterator[Any], model: Any) -> Any:
        """The entry script's, after a round of the others."""
        import pretrain_gpt

        if self.opened is not None and self.entered > self.warmup:
            self.times.setdefault("loop", []).append(clock() - self.opened)
        if not self.steps:
            tokens = torch.randint(0, self.case.vocab - 1, (self.case.micro_batch, self.case.seq))
            self.steps = {
                "bare": bare(self.case, tokens), "huggingface": huggingface(self.case, tokens, half=False)
            }  # fmt: skip
            if self.case.bf16:
                self.steps["half"] = huggingface(self.case, tokens, half=True)
            self.steps["matmul"] = matmul(self.case)
        names = list(self.steps)
        turn = self.entered % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            self.steps[name]()
            if self.entered >= self.warmup:
                self.times.setdefault(name, []).append(clock() - start)
        self.entered += 1
        self.opened = clock()
        return pretrain_gpt.forward_step(iterator, model)


def measure(case: Case, rounds: int, profile: bool) -> dict[str, Any]:
    """Run one case in this process; seconds of every round per contender."""
    import pretrain_gpt
    from megatron.core.enums import ModelType
    from megatron.training import get_args, pretrain
    from megatron.training.flops import num_floating_point_operations

    warmup = 2
    meter = Rounds(case, warmup, profile)
    provider: Any = pretrain_gpt.train_valid_test_datasets_provider
    provider.is_distributed = True
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = case.command(warmup + rounds + 1, folder)
        with open(f"{folder}/log", "w") as log, contextlib.redirect_stdout(log):
            watched = torch.profiler.profile() if profile else contextlib.nullcontext()
            with watched:
                pretrain(
                    provider, pretrain_gpt.model_provider, ModelType.encoder_or_decoder, meter.forward_step
                )
    if profile:
        print(watched.key_averages().table(sort_by="self_cpu_time_total", row_limit=40), file=sys.stderr)
    return {"times": meter.times, "flops": num_floating_point_operations(get_args(), case.micro_batch)}


def summary(name: str, case: Case, measured: dict[str, Any]) -> dict[str, Any]:
    """Medians and the ratios between them."""
    times = {who: statistics.median(samples) for who, samples in measured["times"].items()}
    rate = 3 * 2 * 1024**3 / times.pop("matmul") / 1e9
    # Neighbours in time, so that what slows the machine for a while falls out of their ratio.
    loops, bares = measured["times"]["loop"], measured["times"]["bare"]
    rivals = [times[who] for who in ("huggingface", "half") if who in times]
    result: dict[str, Any] = {
        "case": name,
        "milliseconds": {who: round(1000 * seconds, 1) for who, seconds in times.items()},
        "best_milliseconds": {
            who: round(1000 * min(samples), 1)
            for who, samples in measured["times"].items()
            if who != "matmul"
        },
        "tokens_per_second": round(case.micro_batch * case.seq / times["loop"]),
        "matmul_gflops": round(rate, 1),
        "share_of_matmul_rate": round(measured["flops"] / times["loop"] / 1e9 / rate, 3),
        "speedup_over_huggingface": round(times["huggingface"] / times["loop"], 2),
        "speedup_over_fastest_huggingface": round(min(rivals) / times["loop"], 2),
        "framework_cost": round(statistics.median(map(operator.truediv, loops, bares)) - 1, 3),
    }
    if name in V09:
        milliseconds, reference = V09[name]
        result["v09_milliseconds_at_this_rate"] = round(milliseconds * reference / rate, 1)
        result["speedup_over_v09"] = round(milliseconds * reference / rate / (1000 * times["loop"]), 2)
    return result


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    import transformers

    return {
        "command": " ".join(["python", "benchmarks/cpu_pretrain.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "clock": "CPU time" if threads == 1 else "wall",
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }


def in_own_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a case in a fresh interpreter, so that none meets the memory or threads of the one before."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        words = ["--only-case", name, "--answer", answer.name, "--rounds", str(options.rounds)]
        words += ["--profile"] if options.profile else []
        threads = {"OMP_NUM_THREADS": str(options.threads)}
        subprocess.run([sys.executable, __file__, *words], env=os.environ | threads, check=True)
        return json.load(answer)


def markdown(results: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The page of docs/."""
    lines = [
        "# Training speed on the CPU",
        "",
        f"`{machine['command']}` on {machine['cores']} cores ({machine['cpu']}), {machine['threads']} threads, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}; "
        f"{machine['clock']}, medians; load average {', '.join(map(str, machine['load_average']))}.",
        "",
        "Milliseconds per step. *loop*: `pretrain_gpt.py` as a user runs it. *bare*: the same modules, backward, clipping",
        "and AdamW without the framework. *HF*: transformers' GPT-2 of the same shape, clipping and AdamW; in bf16 under",
        "autocast (fp32 parameters, as ours keeps) and, *bf16 parameters*, without them. *v0.9*: Megatron-LM core_v0.9.0",
        "on a quiet CPU, scaled to the matmul rate of this run. *share*: model FLOP/s over the rate of a 1024³ product in",
        "the same run; the FLOPs count all of causal attention, of which half is skipped. *framework*: the median of",
        "loop / bare within a round, less 1.",
        "",
        "| case | loop | bare | HF | HF bf16 parameters | v0.9 | tokens/s | share | HF / loop | v0.9 / loop | framework |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        ms = row["milliseconds"]
        lines.append(
            f"| {row['case']} | {ms['loop']:.0f} | {ms['bare']:.0f} | {ms['huggingface']:.0f} | {ms.get('half', '-')} "
            f"| {row.get('v09_milliseconds_at_this_rate', '-')} | {row['tokens_per_second']} "
            f"| {row['share_of_matmul_rate']:.0%} | {row['speedup_over_huggingface']:.2f} "
            f"| {row.get('speedup_over_v09', '-')} | {row['framework_cost']:+.1%} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure the cases and write the figures down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", nargs="+", choices=CASES, help="without it: all, and the results are written"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--profile", action="store_true", help="print where the time goes, all contenders together"
    )
    parser.add_argument("--only-case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_case:
        measured = measure(CASES[options.only_case], options.rounds, options.profile)
        Path(options.answer).write_text(json.dumps(measured))
        return
    results = []
    for name in options.case or CASES:
        results.append(summary(name, CASES[name], in_own_process(name, options)))
        print(json.dumps(results[-1], indent=1), flush=True)
    machine = environment(options.threads)
    print(markdown(results, machine))
    if not options.case:
        (ROOT / "benchmarks/results").mkdir(exist_ok=True)
        record = {"environment": machine, "results": results}
        (ROOT / "benchmarks/results/cpu_pretrain.json").write_text(json.dumps(record, indent=1) + "\n")
        (ROOT / "docs/benchmarks_cpu.md").write_text(markdown(results, machine))


if __name__ == "__main__":
    main()
